"""Characters with equal properties in all Unicode tables in use.

Two tokenizers treat them alike. `tokenizers` 0.22 has the letter and symbol classes of Unicode 16
and the compositions of Unicode 9; gigatoken has Unicode 17 for both. A character that only the
newer table contains is a letter to one library and unassigned to the other, or is reordered by one
and not by the other (U+1E135 after U+11235: found by comparing the libraries). What a table says
about a character never changes once it is assigned, as far as it matters here (the stability policy
of Unicode; tests compare them all).

A string is therefore safe if all its characters were assigned by Unicode 14 (`SAFE`). Strings with
characters that NFC may combine or reorder (`COMBINING`) are checked further. Steps:

1. Skip strings that are ASCII.
2. Look up the first two bytes of each other character in a table: most blocks of 64 characters
   contain none to check.
3. Decode the remaining characters, and look each one up.

Cost: one scan of the UTF-8 bytes. Reference: `is_safe` and `unicodedata` on each string
(tests/tokenize/test_unicode_safe.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray

_STEP = 1 << 20  # bytes per step of the scan, so that its arrays fit into the cache of a processor


def texts_to_check(texts: Sequence[str], encoded: Sequence[bytes]) -> list[int]:
    """Return the indices of possibly unsafe strings, and of those NFC may change.

    Args:
        texts: The strings.
        encoded: The same strings in UTF-8.
    """
    rows = [index for index, text in enumerate(texts) if not text.isascii()]
    to_check: set[int] = set()
    first = 0
    while first < len(rows):
        # Group strings of about _STEP bytes.
        last, size = first, 0
        while last < len(rows) and size < _STEP:
            size += len(encoded[rows[last]])
            last += 1
        group = rows[first:last]
        offsets = _find_to_check(b"".join([*(encoded[index] for index in group), bytes(3)]))
        if len(offsets):
            ends = np.cumsum([len(encoded[index]) for index in group])
            to_check.update(group[k] for k in np.searchsorted(ends, offsets, side="right").tolist())
        first = last
    return sorted(to_check)


def changed_texts(texts: Sequence[str], encoded: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """Return the indices of unsafe strings, and of strings not in NFC.

    Args:
        texts: The strings.
        encoded: The same strings in UTF-8.
    """
    to_check = texts_to_check(texts, encoded)
    return (
        [index for index in to_check if not is_safe(texts[index])],
        [index for index in to_check if not is_normalized("NFC", texts[index])],
    )


def is_safe(text: str) -> bool:
    """Return whether all characters of a string are in `SAFE`."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return bool(_safe_table()[codes].all())


def may_combine(character: str) -> bool:
    """Return whether a character may change together with the one before it."""
    return bool(_check_tables()[1][ord(character)])


def _find_to_check(data: bytes) -> NDArray[np.int64]:
    """Return the byte offsets of characters to check.

    Args:
        data: UTF-8, followed by three more bytes, so that every character can be read as if it had
            four bytes.
    """
    values = np.frombuffer(data, np.uint8)
    begins = np.flatnonzero(values >= 0xC0)
    blocks, to_check = _check_tables()
    # View every two successive bytes as one number: half of the time of two lookups.
    pairs = np.ndarray((len(data) - 1,), "<u2", data, strides=(1,))
    begins = begins[blocks[pairs[begins]]]
    if not len(begins):
        return np.empty(0, np.int64)
    # Decode the remaining characters, which have two to four bytes.
    one, two, three, four = (values[begins + k].astype(np.uint32) for k in range(4))
    two, three, four = two & 0x3F, three & 0x3F, four & 0x3F
    codes = np.where(
        one < 0xE0,
        (one & 0x1F) << 6 | two,
        np.where(
            one < 0xF0,
            (one & 0x0F) << 12 | two << 6 | three,
            (one & 0x07) << 18 | two << 12 | three << 6 | four,
        ),
    )
    offsets: NDArray[np.int64] = begins[to_check[codes]]
    return offsets


@cache
def _check_tables() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the tables of characters to check.

    Returns:
        bool [0x10000], by the first two bytes of a character (first + 256 * second): whether any
        character that begins with them must be checked; and bool [0x110000], by code point.
    """
    to_check = ~_safe_table()
    to_check |= _parse_ranges(COMBINING)
    # The first two bytes of each code point, encoded for all at once.
    codes = np.flatnonzero(to_check)
    codes = codes[codes >= 0x80]
    first_two = np.where(
        codes < 0x800,
        0xC0 | codes >> 6 | (0x80 | codes & 0x3F) << 8,
        np.where(
            codes < 0x10000,
            0xE0 | codes >> 12 | (0x80 | codes >> 6 & 0x3F) << 8,
            0xF0 | codes >> 18 | (0x80 | codes >> 12 & 0x3F) << 8,
        ),
    )
    blocks = np.zeros(0x10000, np.bool_)
    blocks[first_two] = True
    return blocks, to_check


@cache
def _safe_table() -> NDArray[np.bool_]:
    """Return the code points on which all Unicode tables in use agree: bool [0x110000].

    The table has a megabyte, so it is made once, when the first string beyond ASCII needs it.
    """
    return _parse_ranges(SAFE)


def _parse_ranges(ranges: str) -> NDArray[np.bool_]:
    table = np.zeros(0x110000, np.bool_)
    for entry in ranges.split():
        first, _, last = entry.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table


COMBINING = """
300-34e 350-36f 374 37e 387 483-487 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 610-61a 64b-65f 670 6d6-6dc
6df-6e4 6e7-6e8 6ea-6ed 711 730-74a 7eb-7f3 816-819 81b-823 825-827 829-82d 859-85b 8d4-8e1 8e3-8ff
93c 94d 951-954 958-95f 9bc 9be 9cd 9d7 9dc-9dd 9df a33 a36 a3c a4d a59-a5b a5e abc acd b3c b3e b4d
b56-b57 b5c-b5d bbe bcd bd7 c4d c55-c56 cbc cc2 ccd cd5-cd6 d3e d4d d57 dca dcf ddf e38-e3a e48-e4b
eb8-eb9 ec8-ecb f18-f19 f35 f37 f39 f43 f4d f52 f57 f5c f69 f71-f76 f78 f7a-f7d f80-f84 f86-f87 f93
f9d fa2 fa7 fac fb5 fb7 fb9 fc6 102e 1037 1039-103a 108d 1161-1175 11a8-11c2 135d-135f 1714 1734
17d2 17dd 18a9 1939-193b 1a17-1a18 1a60 1a75-1a7c 1a7f 1ab0-1abd 1b34-1b35 1b44 1b6b-1b73 1baa-1bab
1be6 1bf2-1bf3 1c37 1cd0-1cd2 1cd4-1ce0 1ce2-1ce8 1ced 1cf4 1cf8-1cf9 1dc0-1df5 1dfb-1dff 1f71 1f73
1f75 1f77 1f79 1f7b 1f7d 1fbb 1fbe 1fc9 1fcb 1fd3 1fdb 1fe3 1feb 1fee-1fef 1ff9 1ffb 1ffd 2000-2001
20d0-20dc 20e1 20e5-20f0 2126 212a-212b 2329-232a 2adc 2cef-2cf1 2d7f 2de0-2dff 302a-302f 3099-309a
a66f a674-a67d a69e-a69f a6f0-a6f1 a806 a8c4 a8e0-a8f1 a92b-a92d a953 a9b3 a9c0 aab0 aab2-aab4
aab7-aab8 aabe-aabf aac1 aaf6 abed f900-fa0d fa10 fa12 fa15-fa1e fa20 fa22 fa25-fa26 fa2a-fa6d
fa70-fad9 fb1d-fb1f fb2a-fb36 fb38-fb3c fb3e fb40-fb41 fb43-fb44 fb46-fb4e fe20-fe2f 1d15e-1d169
1d16d-1d172 1d17b-1d182 1d185-1d18b 1d1aa-1d1ad 1d1bb-1d1c0 1d242-1d244 1e000-1e006 1e008-1e018
1e01b-1e021 1e023-1e024 1e026-1e02a 1e8d0-1e8d6 1e944-1e94a 2f800-2fa1d
"""
"""Code points of `SAFE`, in hex, that NFC may change, reorder, or compose with another one.

Source: `unicodedata` of Python 3.11; tests/tokenize/test_unicode_safe.py checks them.
"""

SAFE = """
0-377 37a-37f 384-38a 38c 38e-3a1 3a3-52f 531-556 559-58a 58d-58f 591-5c7 5d0-5ea 5ef-5f4 600-70d
70f-74a 74d-7b1 7c0-7fa 7fe-82d 830-83e 840-85b 85e 860-86a 870-88e 890-891 8a0-8c9 8d4-983 985-98c
98f-990 993-9a8 9aa-9b0 9b2 9b6-9b9 9bc-9c4 9c7-9c8 9cb-9ce 9d7 9dc-9dd 9df-9e3 9e6-9fd a01-a03
a05-a0a a0f-a10 a13-a28 a2a-a30 a32-a33 a35-a36 a38-a39 a3c a3e-a42 a47-a48 a4b-a4d a51 a59-a5c a5e
a66-a76 a81-a83 a85-a8d a8f-a91 a93-aa8 aaa-ab0 ab2-ab3 ab5-ab9 abc-ac5 ac7-ac9 acb-acd ad0 ae0-ae3
ae6-af1 af9-aff b01-b03 b05-b0c b0f-b10 b13-b28 b2a-b30 b32-b33 b35-b39 b3c-b44 b47-b48 b4b-b4d
b55-b57 b5c-b5d b5f-b63 b66-b77 b82-b83 b85-b8a b8e-b90 b92-b95 b99-b9a b9c b9e-b9f ba3-ba4 ba8-baa
bae-bb9 bbe-bc2 bc6-bc8 bca-bcd bd0 bd7 be6-bfa c00-c0c c0e-c10 c12-c28 c2a-c39 c3d-c44 c46-c48
c4a-c4d c55-c56 c58-c5a c5d c60-c63 c66-c6f c77-c8c c8e-c90 c92-ca8 caa-cb3 cb5-cb9 cbc-cc4 cc6-cc8
cca-ccd cd5-cd6 cdd-cde ce0-ce3 ce6-cef cf1-cf2 d00-d0c d0e-d10 d12-d3a d3d-d44 d46-d48 d4a-d4f
d54-d63 d66-d7f d81-d83 d85-d96 d9a-db1 db3-dbb dbd dc0-dc6 dca dcf-dd4 dd6 dd8-ddf de6-def df2-df4
e01-e3a e3f-e5b e81-e82 e84 e86-e8a e8c-ea3 ea5 ea7-eb9 ebb-ebd ec0-ec4 ec6 ec8-ecd ed0-ed9 edc-edf
f00-f47 f49-f6c f71-f97 f99-fbc fbe-fcc fce-fda 1000-10c5 10c7 10cd 10d0-1248 124a-124d 1250-1256
1258 125a-125d 1260-1288 128a-128d 1290-12b0 12b2-12b5 12b8-12be 12c0 12c2-12c5 12c8-12d6 12d8-1310
1312-1315 1318-135a 135d-137c 1380-1399 13a0-13f5 13f8-13fd 1400-169c 16a0-16f8 1700-1714 171f-1736
1740-1753 1760-176c 176e-1770 1772-1773 1780-17dd 17e0-17e9 17f0-17f9 1800-1819 1820-1878 1880-18aa
18b0-18f5 1900-191e 1920-192b 1930-193b 1940 1944-196d 1970-1974 1980-19ab 19b0-19c9 19d0-19da
19de-1a1b 1a1e-1a5e 1a60-1a7c 1a7f-1a89 1a90-1a99 1aa0-1aad 1ab0-1abe 1b00-1b4c 1b50-1b7e 1b80-1bf3
1bfc-1c37 1c3b-1c49 1c4d-1c88 1c90-1cba 1cbd-1cc7 1cd0-1cfa 1d00-1df5 1dfb-1f15 1f18-1f1d 1f20-1f45
1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fc4 1fc6-1fd3 1fd6-1fdb 1fdd-1fef
1ff2-1ff4 1ff6-1ffe 2000-2064 2066-2071 2074-208e 2090-209c 20a0-20c0 20d0-20f0 2100-218b 2190-2426
2440-244a 2460-2b73 2b76-2b95 2b97-2cf3 2cf9-2d25 2d27 2d2d 2d30-2d67 2d6f-2d70 2d7f-2d96 2da0-2da6
2da8-2dae 2db0-2db6 2db8-2dbe 2dc0-2dc6 2dc8-2dce 2dd0-2dd6 2dd8-2dde 2de0-2e5d 2e80-2e99 2e9b-2ef3
2f00-2fd5 2ff0-2ffb 3000-303f 3041-3096 3099-30ff 3105-312f 3131-318e 3190-31e3 31f0-321e 3220-a48c
a490-a4c6 a4d0-a62b a640-a6f7 a700-a7ca a7d0-a7d1 a7d3 a7d5-a7d9 a7f2-a82b a830-a839 a840-a877
a880-a8c5 a8ce-a8d9 a8e0-a953 a95f-a97c a980-a9cd a9cf-a9d9 a9de-a9fe aa00-aa36 aa40-aa4d aa50-aa59
aa5c-aac2 aadb-aaf6 ab01-ab06 ab09-ab0e ab11-ab16 ab20-ab26 ab28-ab2e ab30-ab6b ab70-abed abf0-abf9
ac00-d7a3 d7b0-d7c6 d7cb-d7fb e000-fa6d fa70-fad9 fb00-fb06 fb13-fb17 fb1d-fb36 fb38-fb3c fb3e
fb40-fb41 fb43-fb44 fb46-fbc2 fbd3-fd8f fd92-fdc7 fdcf fdf0-fe19 fe20-fe52 fe54-fe66 fe68-fe6b
fe70-fe74 fe76-fefc feff ff01-ffbe ffc2-ffc7 ffca-ffcf ffd2-ffd7 ffda-ffdc ffe0-ffe6 ffe8-ffee
fff9-fffd 1d000-1d0f5 1d100-1d126 1d129-1d1ea 1d200-1d245 1d2e0-1d2f3 1d300-1d356 1d360-1d378
1d400-1d454 1d456-1d49c 1d49e-1d49f 1d4a2 1d4a5-1d4a6 1d4a9-1d4ac 1d4ae-1d4b9 1d4bb 1d4bd-1d4c3
1d4c5-1d505 1d507-1d50a 1d50d-1d514 1d516-1d51c 1d51e-1d539 1d53b-1d53e 1d540-1d544 1d546
1d54a-1d550 1d552-1d6a5 1d6a8-1d7cb 1d7ce-1da8b 1da9b-1da9f 1daa1-1daaf 1df00-1df1e 1e000-1e006
1e008-1e018 1e01b-1e021 1e023-1e024 1e026-1e02a 1e100-1e12c 1e137-1e13d 1e140-1e149 1e14e-1e14f
1e290-1e2ad 1e2c0-1e2eb 1e2f0-1e2f9 1e2ff 1e7e0-1e7e6 1e7e8-1e7eb 1e7ed-1e7ee 1e7f0-1e7fe
1e800-1e8c4 1e8c7-1e8d6 1e900-1e94b 1e950-1e959 1e95e-1e95f 1ec71-1ecb4 1ed01-1ed3d 1ee00-1ee03
1ee05-1ee1f 1ee21-1ee22 1ee24 1ee27 1ee29-1ee32 1ee34-1ee37 1ee39 1ee3b 1ee42 1ee47 1ee49 1ee4b
1ee4d-1ee4f 1ee51-1ee52 1ee54 1ee57 1ee59 1ee5b 1ee5d 1ee5f 1ee61-1ee62 1ee64 1ee67-1ee6a
1ee6c-1ee72 1ee74-1ee77 1ee79-1ee7c 1ee7e 1ee80-1ee89 1ee8b-1ee9b 1eea1-1eea3 1eea5-1eea9
1eeab-1eebb 1eef0-1eef1 1f000-1f02b 1f030-1f093 1f0a0-1f0ae 1f0b1-1f0bf 1f0c1-1f0cf 1f0d1-1f0f5
1f100-1f1ad 1f1e6-1f202 1f210-1f23b 1f240-1f248 1f250-1f251 1f260-1f265 1f300-1f6d7 1f6dd-1f6ec
1f6f0-1f6fc 1f700-1f773 1f780-1f7d8 1f7e0-1f7eb 1f7f0 1f800-1f80b 1f810-1f847 1f850-1f859
1f860-1f887 1f890-1f8ad 1f8b0-1f8b1 1f900-1fa53 1fa60-1fa6d 1fa70-1fa74 1fa78-1fa7c 1fa80-1fa86
1fa90-1faac 1fab0-1faba 1fac0-1fac5 1fad0-1fad9 1fae0-1fae7 1faf0-1faf6 1fb00-1fb92 1fb94-1fbca
1fbf0-1fbf9 20000-2a6df 2a700-2b738 2b740-2b81d 2b820-2cea1 2ceb0-2ebe0 2f800-2fa1d 30000-3134a
e0001 e0020-e007f e0100-e01ef f0000-ffffd 100000-10fffd
"""
"""Safe code points, in hex.

Source: `unicodedata` of Python 3.11 (Unicode 14.0): every category but Cn and Cs, without the code
points that combine, decompose or compose and for which its NFC differs from that of tokenizers, and
without the ancient scripts from U+10000 to U+1CFFF, which are too rare to be worth the space.
tests/tokenize/test_unicode_safe.py checks these statements.
"""
