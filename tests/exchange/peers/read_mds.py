"""Print the rows that MosaicML Streaming reads from a folder, as lines of JSON."""

import json
import sys

from streaming import StreamingDataset

for row in StreamingDataset(local=sys.argv[1], batch_size=1, shuffle=False):
    print(json.dumps({name: values.tolist() for name, values in row.items()}))
