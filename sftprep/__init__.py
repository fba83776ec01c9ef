"""Preparation of packed, padding-free training data from raw conversations.

The public names are imported when they are first used, so that `import sftprep` is fast.
"""

import os
import sys

# With `python -m sftprep`, also of a submodule, Python searches the working directory first, and
# nothing but this package may come from it. Until then, only modules that the interpreter loads at
# its start are imported. The name of the module is before the arguments, also in `-msftprep`.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].partition(".")[0].rpartition("m")[2] == "sftprep"
    and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
):
    del sys.path[0]

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sftprep.version import __version__ as __version__

if TYPE_CHECKING:
    from sftprep.api import build as build
    from sftprep.api import doctor as doctor
    from sftprep.api import preview as preview
    from sftprep.chat_template.shipped import SHIPPED_TEMPLATES as SHIPPED_TEMPLATES
    from sftprep.config import BuildConfig as BuildConfig
    from sftprep.exchange.exports.export import ExportReport as ExportReport
    from sftprep.exchange.exports.export import export as export
    from sftprep.exchange.imports.convert import import_config as import_config
    from sftprep.exchange.imports.converted import Conversion as Conversion
    from sftprep.packing.strategies import PackPlan as PackPlan
    from sftprep.packing.strategies import pack_lengths as pack_lengths
    from sftprep.pipeline.build import BuildReport as BuildReport
    from sftprep.pipeline.build_subprocess import build_in_subprocess as build_in_subprocess
    from sftprep.pipeline.output.hub import PushReport as PushReport
    from sftprep.pipeline.output.merge import merge as merge
    from sftprep.pipeline.output.push import push as push
    from sftprep.pipeline.part import PartReport as PartReport
    from sftprep.pipeline.prepare.chat_templates import ChosenTemplate as ChosenTemplate
    from sftprep.pipeline.prepare.chat_templates import choose_template as choose_template
    from sftprep.pipeline.verify import verify as verify
    from sftprep.previews.result import Preview as Preview
    from sftprep.records.transform import Drop as Drop
    from sftprep.report.environment import Environment as Environment
    from sftprep.report.environment import describe_environment as describe_environment
    from sftprep.shards.manifest import Manifest as Manifest
    from sftprep.shards.manifest import read_manifest as read_manifest
    from sftprep.shards.reading.open_build import open_shards as open_shards
    from sftprep.shards.reading.pack import Pack as Pack
    from sftprep.shards.reading.shards import Shards as Shards
    from sftprep.sources.readers.to_jsonl import json_lines as json_lines
    from sftprep.tokenize.loading.export import export_tokenizer as export_tokenizer
    from sftprep.tokenize.loading.load import TokenizerSpec as TokenizerSpec
    from sftprep.tokenize.loading.load import load_tokenizer as load_tokenizer
    from sftprep.tokenize.loading.load import tokenizer_spec as tokenizer_spec

# The public names, and the module that defines each of them.
_MODULE_OF = {
    "BuildConfig": "sftprep.config",
    "Drop": "sftprep.records.transform",
    "BuildReport": "sftprep.pipeline.build",
    "build": "sftprep.api",
    "preview": "sftprep.api",
    "doctor": "sftprep.api",
    "Preview": "sftprep.previews.result",
    "Environment": "sftprep.report.environment",
    "describe_environment": "sftprep.report.environment",
    "ExportReport": "sftprep.exchange.exports.export",
    "export": "sftprep.exchange.exports.export",
    "Conversion": "sftprep.exchange.imports.converted",
    "import_config": "sftprep.exchange.imports.convert",
    "build_in_subprocess": "sftprep.pipeline.build_subprocess",
    "merge": "sftprep.pipeline.output.merge",
    "PartReport": "sftprep.pipeline.part",
    "ChosenTemplate": "sftprep.pipeline.prepare.chat_templates",
    "choose_template": "sftprep.pipeline.prepare.chat_templates",
    "SHIPPED_TEMPLATES": "sftprep.chat_template.shipped",
    "PushReport": "sftprep.pipeline.output.hub",
    "push": "sftprep.pipeline.output.push",
    "PackPlan": "sftprep.packing.strategies",
    "pack_lengths": "sftprep.packing.strategies",
    "Manifest": "sftprep.shards.manifest",
    "read_manifest": "sftprep.shards.manifest",
    "Pack": "sftprep.shards.reading.pack",
    "Shards": "sftprep.shards.reading.shards",
    "open_shards": "sftprep.shards.reading.open_build",
    "verify": "sftprep.pipeline.verify",
    "json_lines": "sftprep.sources.readers.to_jsonl",
    "export_tokenizer": "sftprep.tokenize.loading.export",
    "TokenizerSpec": "sftprep.tokenize.loading.load",
    "load_tokenizer": "sftprep.tokenize.loading.load",
    "tokenizer_spec": "sftprep.tokenize.loading.load",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sftprep' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
