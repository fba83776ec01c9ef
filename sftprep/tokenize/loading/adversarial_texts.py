"""Difficult strings for tokenizers: the fixed part of every comparison."""

from __future__ import annotations

from itertools import pairwise

from sftprep.tokenize.loading.spec import TokenizerSpec

ADVERSARIAL_TEXTS_VERSION = 2
"""To be increased when a text is added, so that cached answers are determined again."""


def adversarial_texts(spec: TokenizerSpec) -> list[str]:
    """Return the fixed texts, and texts with each added token of a tokenizer.

    Added tokens occur with neighbors, with whitespace, doubled, broken, and in other cases.
    """
    added = list(spec.added_tokens())
    texts = [*_PLAIN, *_long_texts()]
    for token in added:
        texts += [
            f"a{token}b",
            f"a {token} b",
            f"  {token}\n\n",
            f"{token}{token}",
            f"é{token}中",
            f"{token} {token[1:]}{token[:-1]}",
            token.lower() + token.upper(),
        ]
    texts += [a + b for a, b in pairwise(added)]
    texts.append(" ".join(added))
    return texts


_PLAIN = (
    "",
    " ",
    "a",
    "  ",
    " a",
    "a ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "a\x00b\x01\x7f\x1b[0m",
    "Hello, world! It's we're I'LL don'T you've he'd 's 'S 'ſ",
    "The quick brown fox jumps over the lazy dog.",
    "line\nline\n\nline\r\n\r\nline \n \n  line\t\tline\n\n\n",
    "def f(x):\n    if x:\n\treturn {'a': [1, 2.5e-10]}\n    # done   \n",
    "   leading and trailing   ",
    "a  b   c    d     e      f       g        h",
    "non\u00a0breaking\u2003em\u3000ideographic\u200bzero\u2028line\u2029paragraph"
    "\ufeffmark\u0085next\x0bvertical\x0cfeed",
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890 12345678901",
    "1,234.56 3.14159 0x1F 1e-9 ½ ² ٣٤٥ ४५६ Ⅻ ①② １２３",
    "v1.2.3-rc4+build.5 192.168.0.1 2024-01-31T23:59:59Z +1 (555) 010-9999",
    "ÀÉÎõü ñ ß ẞ æ œ ø å ł đ ħ ŋ þ ð İ ı ǅ ŉ ſ",
    "e\u0301a\u0308o\u0302\u0301n\u0303 a\u0323\u0302 a\u0302\u0323 q\u0307\u0323 q\u0323\u0307",
    "\u0301start \u1100\u1161\u11a8 \u0344",
    "Å Å Å ﬁ ﬀ ﷺ ℌ ㎏ ½ ① ｱ ａ が か\u3099 각 각 가\u11a8",
    "Привет, как дела? Ёж и ёж. Ω ω ά ά ς σ Σ",
    "مرحبا بالعالم السَّلامُ عَلَيْكُم ـــ لا ﻻ ۱۲۳",
    "שלום עולם שָׁלוֹם",
    "नमस्ते दुनिया क्षत्रिय বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල",
    "สวัสดีชาวโลก ລາວ မြန်မာ ខ្មែរ བོད་ཡིག",
    "你好，世界！今天天气怎么样？「引号」『』、。…——",
    "中文English混合123文字，。日本語テスト。ひらがなカタカナ漢字々〆ヶ",
    "안녕하세요 세계 한국어 테스트입니다",
    "𠀀𠮷𪜀 㐀㐁 豈更 ⼀⼁",
    "😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ ☺️ ☺ ❤️‍🔥 🤯🥺",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𝒜 🅰️ 🄰 ℝ ∀x∈ℝ: ∃y ≤ x² ∑∏∫√∞ ≠ ± × ÷ → ⇒ ↔",
    "\ue000\uf8ff private \U000f0000\U0010fffd use \ufffd replacement \ufffc object",
    "tags \U000e0061\U000e007f selectors a\ufe0e\ufe0f\U000e0100",
    "joiners a\u200db\u200cc\u2060d bidi \u202eabc\u202c \u2066x\u2069",
    "!!! ??? ... --- === *** ### ~~~ ``` ''' \"\"\" ((( ))) [[[ ]]] {{{ }}}",
    "<<< >>> /// \\\\\\ ||| &&& %%% $$$ @@@ ^^^ ___ ;;; :::",
    (
        "!a ?b .c -d =e *f #g ~h `i 'j \"k (l )m [n ]o {p }q <r >s /t \\u |v &w %x $y @z ^1 _2 ;3"
        " :4 ,5"
    ),
    "a!\n b?\r\n c.\n\n d)\t\n .\n,\n;\n",
    (
        "CamelCase snake_case SCREAMING_CASE kebab-case dot.case path/to/file.txt C:\\dir\\file.txt"
        " user@example.com"
    ),
    (
        'https://example.com/a/b?c=d&e=%20f#g <a href="x">&amp;&nbsp;</a> {{ user }} {% if x %}'
        " ${y} $z^2$ \\frac{1}{2}"
    ),
    "▁ ▁▁ a▁b ▁a Ġ Ġa Ċ <0x0A> <0xE4> <unk> <s> </s> <pad> [INST] <|im_start|> <|endoftext|> <|end",
    "ẛ̣ ϓ ﹺ ʹ ΅ ẋ̣ 각ᆯ ક્ષ ☃̈ ॐ̀",
    "<0x0A>",
    "a<0x41>b <0xE4><0xBD><0xA0>\n<0x0a> ▁<0x0A>▁",
    "i̇ İ ı ss ß ﬃ K k Å å ſs ŝ",
    "x" * 70 + " " + "y" * 300,
    (
        "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis"
        " Donaudampfschifffahrtsgesellschaft"
    ),
)


def _long_texts() -> list[str]:
    """Return a very long word, long whitespace, and other long texts.

    The texts are longer than the buffers of libraries.
    """
    return [
        "ab" * 5000,
        " " * 5000 + "x",
        "\n" * 3000 + " \n" * 1000,
        "=" * 4000 + "-" * 4001,
        "好" * 3000,
        "🤯" * 1000,
        "0123456789" * 400,
        "a\u0301" * 1500,
        "\n".join(_PLAIN) * 3,
    ]
