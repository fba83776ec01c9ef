"""Import this module last to exclude everything imported before it from garbage collection."""

import gc

gc.collect()
gc.freeze()
