"""A training loop of one's own over a stream, which saves where it stands and goes on from there.

python examples/tiny_model.py --output demo/model && python examples/stream/plain_loop.py
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sftprep.stream import open_stream
from sftprep.torch import StreamLoader, collate_packs, pack_to_tensors


def main(
    model_folder: str = "demo/model", data: str = "examples/data/chats.jsonl", steps: int = 4
) -> list[float]:
    """Train for some steps, save, and go on as another process would; the losses."""
    losses = train(model_folder, data, steps // 2, state_file=Path(model_folder) / "stream.json")
    losses += train(
        model_folder, data, steps - steps // 2, state_file=Path(model_folder) / "stream.json"
    )
    print("losses:", ", ".join(f"{loss:.3f}" for loss in losses))
    return losses


def train(model_folder: str, data: str, steps: int, state_file: Path) -> list[float]:
    """Some steps from where the last ones ended."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stream = open_stream(data, tokenizer=model_folder, max_length=512, lanes=4)
    loader = StreamLoader(
        stream, 2, lambda packs: collate_packs([pack_to_tensors(one) for one in packs]), workers=1
    )
    if state_file.exists():
        loader.load_state_dict(json.loads(state_file.read_text()))
    losses = []
    for batch in loader:
        loss = model(**batch).loss  # position ids that begin anew keep the sequences of a row apart
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    state_file.write_text(json.dumps(loader.state_dict()))
    return losses


if __name__ == "__main__":
    main()
