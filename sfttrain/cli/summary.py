"""The summary of a run, as text and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sftprep.errors import format_count


@dataclass(frozen=True)
class RunSummary:
    """The result of a run, with the names in the output of `--json`."""

    steps: int
    """The optimizer steps of this run, without those before a resume."""
    first_loss: float | None
    """The first logged loss, including those before a resume; None if nothing was logged. A logged
    loss is the mean over the trained tokens since the log entry before."""
    last_loss: float | None
    """The last logged loss, likewise."""
    trained_tokens: int
    """The targets seen, including those before a resume."""
    seconds: float
    """The duration of the training."""
    tokens_per_second: float
    """The trained tokens per second of this run."""
    trained_parameters: int
    """The number of parameters that were trained."""
    parameters: int
    """The number of all parameters."""
    attention: str
    """The attention implementation."""
    unpacked: bool
    """Whether rows were unpacked into padded batches."""
    loss_impl: str
    """"fused" or "logits"."""
    kind: str
    """"adapter" or "model"."""
    output_dir: str
    """The output folder."""
    resumed_from: str | None
    """The folder of the checkpoint from which the run resumed."""
    evaluation: dict[str, float]
    """The metrics of the final evaluation; empty without one."""
    warnings: tuple[str, ...]
    """The warnings about allowed mismatches and executed code."""
    merged: str | None = None
    """The folder of the model with the adapter merged into it (`merge`)."""
    rejected: int = 0
    """The records of a stream that this process quarantined in the last pass."""

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as a JSON object."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """Return the summary as lines for people."""
        losses = (
            ""
            if self.first_loss is None or self.last_loss is None
            else f", loss {self.first_loss:.4f} → {self.last_loss:.4f}"
        )
        lines = [
            f"{format_count(self.steps, 'step')} in {self.seconds:.0f} s{losses}",
            f"{self.trained_tokens:,} trained tokens, {self.tokens_per_second:,.0f} a second",
            (
                f"the {self.kind} is in {self.output_dir} ({self.trained_parameters:,} of"
                f" {self.parameters:,} parameters trained)"
            ),
        ]
        if self.rejected:
            lines.append(f"quarantined records of the stream: {self.rejected:,}")
        if self.merged:
            lines.append(f"the model with the adapter merged into it is in {self.merged}")
        if "eval_loss" in self.evaluation:
            lines.insert(
                1,
                f"evaluation: loss {self.evaluation['eval_loss']:.4f}, perplexity"
                f" {self.evaluation['eval_perplexity']:.2f}",
            )
        return "\n".join(lines)
