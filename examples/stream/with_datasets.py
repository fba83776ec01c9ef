"""A stream of the Hub, or any `datasets.IterableDataset`, mixed with a file; shared out to ranks by
accelerate.

python examples/tiny_model.py --output demo/model && accelerate launch --cpu
examples/stream/with_datasets.py
"""

import torch
from accelerate import Accelerator
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from sftprep.stream import Mixture, PackedStream
from sftprep.torch import StreamLoader, collate_packs, pack_to_tensors


def main(
    model_folder: str = "demo/model", folder: str = "examples/data", steps: int = 3
) -> list[float]:
    """Train for some steps; the losses of this rank."""
    accelerator = Accelerator()
    # In place of the file: load_dataset("org/name", split="train", streaming=True)
    hub = load_dataset("json", data_files=f"{folder}/chats.jsonl", split="train", streaming=True)
    source = Mixture([hub, f"{folder}/qa.jsonl"], weights=[3, 1])
    stream = PackedStream(
        source, model_folder, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    # The loader is this rank's own already: it is not given to accelerator.prepare.
    loader = StreamLoader(
        stream, 2, lambda packs: collate_packs([pack_to_tensors(one) for one in packs])
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for batch in loader:
        loss = model(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()}).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    return losses


if __name__ == "__main__":
    print("losses:", main())
