"""Schemas of tools, in public layouts."""

from __future__ import annotations

import re
from typing import Any

from sftprep.core.json_values import describe_json_type
from sftprep.core.types import function_of
from sftprep.records.options import InvalidRecord, RecordOptions, parse_if_string

_PARAMETER_KEYS = ("parameters", "input_schema", "inputSchema", "arguments")
"""Keys of the parameters of a tool: those of OpenAI, Anthropic and MCP, and one of data sets."""
_DECLARATION_KEYS = ("functionDeclarations", "function_declarations")
"""Keys of a list of functions in a tool of Gemini."""
_SCHEMA_WORDS = {
    "properties": dict,
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), list),
    **dict.fromkeys(("type", "$ref", "$schema"), str | list),
}
"""Words of JSON Schema with the type of their values, which tell a schema from a table."""
_TYPES = {
    **{"str": "string", "text": "string", "int": "integer", "float": "number", "bool": "boolean"},
    **{"list": "array", "tuple": "array", "set": "array", "dict": "object"},
}
"""Names of types in Python, and those of JSON Schema."""
_LIST_OF_TOOLS = (
    'a list of tool schemas, such as [{"type": "function", "function": {"name": "f",'
    ' "description": "...", "parameters": {...}}}]'
)
_OPTIONAL = re.compile(r"\s*,\s*optional\b.*", re.IGNORECASE | re.DOTALL)
"""The end of the type of an optional parameter in a docstring of Python."""
_GENERIC = re.compile(r"(\w+)\[(.+)\]", re.DOTALL)
_GEMINI_TYPES = frozenset({"STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT"})


def read_tools(tools: Any) -> list[Any] | None:
    """Return tool schemas as objects, whether they are objects or JSON strings.

    An empty list becomes None, because templates distinguish the two. A single tool is a list of
    one. The tools of Gemini and Bedrock, whose layouts no template knows, become those of OpenAI.

    Raises:
        InvalidRecord: The tools are not a list, or JSON text that is not valid.
    """
    if isinstance(tools, str) and not tools.strip():
        return None
    tools = parse_if_string(tools, '"tools"')
    if tools is None:
        return None
    if isinstance(tools, dict) and (_find_declarations(tools) is not None or _is_tool(tools)):
        tools = [tools]
    if not isinstance(tools, list):
        what = describe_json_type(tools)
        raise InvalidRecord("bad_tool", f'"tools" is {what}, not {_LIST_OF_TOOLS}')
    return [
        read
        for tool in tools
        for read in _from_cloud_layout(parse_if_string(tool, "a tool schema"))
    ] or None


def _is_tool(value: dict[str, Any]) -> bool:
    """Return whether an object is a tool, as opposed to an object of tools by name."""
    function = value.get("function", value)
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def read_functions(functions: Any) -> list[Any] | None:
    """Return the schemas under the older key `functions` of OpenAI as tools."""
    return [
        tool
        if isinstance(tool, dict) and "function" in tool
        else {"type": "function", "function": tool}
        for tool in read_tools(functions) or ()
    ] or None


def with_parameters(tool: Any, options: RecordOptions) -> Any:
    """Return the schema of a tool with its parameters as an object under `parameters`.

    Anthropic has them under `input_schema`, and some data sets as JSON text. If the template shows
    only the parameters of a JSON schema, a table of parameters becomes one.
    """
    function = function_of(tool)
    if not isinstance(function, dict):
        return tool
    key = next((key for key in _PARAMETER_KEYS if function.get(key)), None)
    if key is None or (key == "arguments" and not isinstance(function[key], dict | list)):
        return tool
    parameters = parse_if_string(function[key], f"{key} of a tool")
    if options.tool_schemas:
        parameters = to_json_schema(parameters)
    if key == "parameters" and parameters is function[key]:
        return tool
    rest = {name: value for name, value in function.items() if name not in _PARAMETER_KEYS}
    renamed = {**rest, "parameters": parameters}
    return renamed if function is tool else {**tool, "function": renamed}


def to_json_schema(parameters: Any) -> Any:
    """Return the JSON schema for a table or a list of parameters; other values are unchanged.

    Example:
        {"city": {"type": "str", "description": "a"}, "days": {"type": "int, optional"}}  ->
            {"type": "object", "properties": {"city": {"type": "string", "description": "a"},
            "days": {"type": "integer"}}, "required": ["city"]}
    """
    table = _to_table(parameters)
    if table is None:
        return parameters
    marks = {name: _find_mark(parameter) for name, parameter in table.items()}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _to_property(parameter) for name, parameter in table.items()},
    }
    # A table without marks does not say which parameters a call may lack.
    if any(mark is not None for mark in marks.values()):
        schema["required"] = [name for name, mark in marks.items() if mark is not False]
    return schema


def _to_table(parameters: Any) -> dict[str, dict[str, Any]] | None:
    """Return parameters by name, or None if it is not certain that they are a table or list."""
    if isinstance(parameters, list):
        are_named = [
            isinstance(item, dict) and isinstance(item.get("name"), str) for item in parameters
        ]
        table = {
            item["name"]: {key: value for key, value in item.items() if key != "name"}
            for item, is_named in zip(parameters, are_named, strict=True)
            if is_named
        }
        return table if parameters and len(table) == len(parameters) else None
    if not isinstance(parameters, dict) or not parameters or _is_schema(parameters):
        return None
    are_described = all(
        isinstance(value, dict) and not value.keys().isdisjoint(("type", "description"))
        for value in parameters.values()
    )
    return parameters if are_described else None


def _is_schema(value: dict[str, Any]) -> bool:
    return any(
        isinstance(value.get(word), value_type) for word, value_type in _SCHEMA_WORDS.items()
    )


def _find_mark(parameter: dict[str, Any]) -> bool | None:
    """Return whether a parameter is marked as required; None without a mark."""
    if isinstance(parameter.get("required"), bool):
        return bool(parameter["required"])
    kind = str(parameter.get("type", ""))
    is_optional = _OPTIONAL.search(kind) or kind.startswith("Optional[") or "default" in parameter
    return False if is_optional else None


def _to_property(parameter: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter, with the types of JSON Schema."""
    schema = {
        key: value
        for key, value in parameter.items()
        if key != "required" or not isinstance(value, bool)
    }
    if isinstance(schema.get("type"), str):
        schema.update(_to_type(schema["type"]))
    return schema


def _to_type(name: str) -> dict[str, Any]:
    """Return the type of Python, such as "List[int]", as the keys of a schema."""
    name = _OPTIONAL.sub("", name).strip()
    generic = _GENERIC.fullmatch(name)
    if generic is None:
        return {"type": _TYPES.get(name.lower(), name)}
    outer, inner = generic[1].lower(), generic[2]
    if outer == "optional":
        return _to_type(inner)
    if outer == "list":
        return {"type": "array", "items": _to_type(inner)}
    return {"type": _TYPES.get(outer, name)}


def _from_cloud_layout(tool: Any) -> list[Any]:
    """Return the tools in a tool of Gemini or Bedrock; any other tool is unchanged."""
    if not isinstance(tool, dict):
        return [tool]
    declarations = _find_declarations(tool)
    if declarations is not None:
        functions = [_from_gemini(item) for item in declarations]
        return [{"type": "function", "function": function} for function in functions]
    specification = tool.get("toolSpec")
    if isinstance(specification, dict) and isinstance(specification.get("name"), str):
        function = {**specification}
        schema = function.pop("inputSchema", None)
        if schema is not None:
            is_wrapped = isinstance(schema, dict) and schema.keys() == {"json"}
            function["parameters"] = schema["json"] if is_wrapped else schema
        return [{"type": "function", "function": function}]
    return [tool]


def _find_declarations(tool: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the functions in a tool of Gemini; None if it has none, or has others as well."""
    if len(tool) != 1:
        return None
    declarations = next((tool[key] for key in _DECLARATION_KEYS if key in tool), None)
    if not isinstance(declarations, list) or not declarations:
        return None
    return declarations if all(isinstance(item, dict) for item in declarations) else None


def _from_gemini(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function of Gemini with its parameters as JSON Schema."""
    schema = function.get("parametersJsonSchema")
    if schema is not None and "parameters" not in function:
        rest = {key: value for key, value in function.items() if key != "parametersJsonSchema"}
        return {**rest, "parameters": schema}
    return {
        key: _with_lower_types(value) if key == "parameters" else value
        for key, value in function.items()
    }


def _with_lower_types(value: Any) -> Any:
    """Return a schema with types in lower case, as JSON Schema writes them."""
    if isinstance(value, list):
        return [_with_lower_types(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: item.lower()
        if key == "type" and isinstance(item, str) and item in _GEMINI_TYPES
        else _with_lower_types(item)
        for key, item in value.items()
    }
