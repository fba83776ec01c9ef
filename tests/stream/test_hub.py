"""A dataset that `datasets` streams from the Hub over a connection that is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.sources.hub_server import Hub, HubHandler, Repo
from tests.stream.plain_packs import rows

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import json, sys
from datasets import load_dataset
from sftprep import BuildConfig
from sftprep.stream import PackedStream
tokenizer, lanes = sys.argv[1], int(sys.argv[2])
data = load_dataset("org/chats", split="train", streaming=True)
def made():
    config = BuildConfig.of(max_length=256, pack_window=30, lanes=lanes, tokenizer=tokenizer)
    return PackedStream(data, config=config, retries=6, retry_wait=0.0)
stream, packs = made(), []
for number, pack in enumerate(stream):
    packs.append(pack.input_ids.tolist())
    if number == 20:
        state = json.loads(json.dumps(stream.state_dict()))
again = made()
again.load_state_dict(state)
rest = [pack.input_ids.tolist() for pack in again]
seen = {"counts": stream.counts, "packs": len(packs)}
print(json.dumps({**seen, "resumes": rest == packs[21:], "shards": data.num_shards}))
"""


class Cutting(HubHandler):
    """Cuts every third file that is asked for in the middle."""

    cuts = 0
    files = 0

    def _send(self, status, data, headers=None, *, body=True):
        if (
            body
            and self.command == "GET"
            and "/resolve/" in self.path
            and status in (200, 206)
            and len(data) > 1000
        ):
            Cutting.files += 1
            if Cutting.files % 3 == 0:
                Cutting.cuts += 1
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
        super()._send(status, data, headers, body=body)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [4, 8])
def test_a_stream_of_the_hub(lanes, tokenizer_dir, tmp_path):
    records = rows("text", 400)
    files = {
        f"train-0000{k}-of-00004.jsonl": (
            "".join(json.dumps(row) + "\n" for row in records[k::4]).encode()
        )
        for k in range(4)
    }
    Cutting.hub = Hub(
        repos={("datasets", "org/chats"): Repo({"main": {"README.md": b"# about", **files}})}
    )
    Cutting.cuts = Cutting.files = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(tokenizer_dir), str(lanes)],
            env={**os.environ, **here},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["shards"] == 4
    assert said["counts"]["records"] == said["counts"]["sequences"] == 400
    assert said["packs"] > 30
    assert said["resumes"]
    assert Cutting.cuts > 0
