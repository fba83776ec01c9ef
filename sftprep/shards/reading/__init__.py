"""Reading of builds of each layout as packs."""
