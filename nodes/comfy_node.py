"""What every node of the pack makes of a prompt before it runs: nothing that was sent is dropped."""

from __future__ import annotations

import reprlib

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..quant_core import SpecError, did_you_mean
from .types import MADE_BY


class Node(io.ComfyNode):
    """A node that refuses what ComfyUI lets pass: an input that it does not have, a constant in place of a wire."""

    @classmethod
    def schema(cls):
        """The node's inputs and outputs."""
        raise NotImplementedError

    @classmethod
    def run(cls, **inputs):
        """The node's work."""
        raise NotImplementedError

    @classmethod
    def define_schema(cls):
        schema = cls.schema()
        schema.hidden = [io.Hidden.prompt]
        return schema

    @classmethod
    def execute(cls, *given, **inputs):
        """Run the node.

        Raises:
            SpecError: the prompt has an input that the node has not, or a constant where a wire belongs.
        """
        schema, sent = cls.schema(), _sent(cls)
        for name in [*sent, *inputs]:
            _check_name(name, schema, sent)
        for wire in schema.inputs:
            _check_wire(wire, inputs)
        return cls.run(*given, **inputs, **_unknown_choices(schema, sent, inputs))


def _sent(node: type[Node]) -> dict:
    """What the prompt says of the running node. Empty where it cannot be told, as of a node that another one made."""
    prompt = getattr(getattr(node, "hidden", None), "prompt", None)
    context = get_executing_context()
    return (prompt or {}).get(context.node_id, {}).get("inputs", {}) if context else {}


def _check_name(name: str, schema: io.Schema, sent: dict) -> None:
    known = []
    for given in schema.inputs:
        known.append(given.id)
        if isinstance(given, io.DynamicCombo.Input) and given.id in sent:
            option = _option(given, sent)
            if option is None and name.startswith(f"{given.id}."):
                return  # a widget of an option that there is not, of which the node will speak
            known += [f"{given.id}.{widget.id}" for widget in (option.inputs if option else [])]
    if name not in known:
        hint = did_you_mean(name, known)
        raise SpecError(f"{schema.display_name} has no input {name!r}{hint}; it takes: {', '.join(known)}.")


def _option(choice: io.DynamicCombo.Input, sent: dict) -> io.DynamicCombo.Option | None:
    return next((option for option in choice.options if option.key == sent[choice.id]), None)


def _check_wire(wire: io.Input, inputs: dict) -> None:
    kind, makers = MADE_BY.get(wire.get_io_type(), (object, ""))
    value = inputs.get(wire.id)
    absent = value is None and (wire.optional or wire.id not in inputs)
    if not absent and not isinstance(value, kind):
        raise SpecError(f"{wire.id} is {reprlib.repr(value)}; it takes a wire from {makers}.")


def _unknown_choices(schema: io.Schema, sent: dict, inputs: dict) -> dict:
    """Choices that ComfyUI drops, since they are none of the options; the node says which there are.

    Raises:
        SpecError: one is no text.
    """
    found = {}
    for choice in schema.inputs:
        if isinstance(choice, io.DynamicCombo.Input) and choice.id not in inputs:
            key = sent.get(choice.id)
            if not isinstance(key, str | None):
                first = choice.options[0].key
                raise SpecError(f"{choice.id} is {reprlib.repr(key)}; it takes a text, as {first!r}.")
            if key is not None:
                found[choice.id] = {choice.id: key}
    return found
