"""Print the batches that Megatron-Bridge makes of single rows of a folder, as lines of JSON."""

import json
import sys
from types import SimpleNamespace

from megatron.bridge.data.packing.parquet import GPTSFTPackedParquetDataset

path, max_length, end_token = sys.argv[1:]
data = GPTSFTPackedParquetDataset(
    path,
    SimpleNamespace(eos_id=int(end_token), eod=int(end_token), bos_id=None, pad_id=None),
    max_seq_length=int(max_length),
    pad_seq_length_to_mult=1,
    label_key="output",
    truncation_field="input",
    prompt_template="{input} {output}",  # required, and not used for tokens
)
for number in range(len(data)):
    batch = data.collate_fn([data[number]])
    names = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens_q")
    print(json.dumps({name: batch[name][0].tolist() for name in names}))
