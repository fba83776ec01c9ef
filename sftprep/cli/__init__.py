"""The `sftprep` command."""

from sftprep.cli.entry import main as main
