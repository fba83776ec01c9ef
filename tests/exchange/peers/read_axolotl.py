"""Print the rows of a split that axolotl keeps for training, as lines of JSON."""

import json
import sys

from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import add_position_ids, filter_sequences_by_length

path, split, sequence_len = sys.argv[1:]
config = DictDefault({"path": path, "split": split, "type": None})
loaded = load_dataset_with_config(config, use_auth_token=False)
rows, _ = get_dataset_wrapper(config, None, DictDefault({}), None, loaded)
rows = rows.filter(lambda row: filter_sequences_by_length(row, int(sequence_len)))
for row in rows.map(add_position_ids):
    print(json.dumps(row))
