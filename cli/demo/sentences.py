"""What the demo's trainer learns from: pairs of sentences that mean the same."""

from __future__ import annotations

__all__ = ("PAIRS", "PROBE")

PROBE = "New weights reach the engine before the next request does."
"""The sentence whose embedding trainer and engines are compared by."""

PAIRS = (
    ("The trainer publishes a checkpoint.", "A new version of the weights is announced."),
    ("The engine serves the newest version.", "Requests are answered by the latest weights."),
    ("Every byte arrived in its place.", "The digest proves that the update is whole."),
    ("The consumer lost its connection.", "The service could not reach the bus."),
    ("The round has a leader.", "One consumer plans for all the others."),
    ("A late engine catches up by itself.", "Who joins after the plan pulls what it needs."),
    ("The slot is overwritten.", "Old weights make room for new ones."),
    ("The worker died in the middle of an update.", "A rank was killed while it wrote."),
    ("The engine stays paused.", "No request is answered until an update ends whole."),
    ("Policy gradients need fresh samples.", "On-policy learning wants new weights quickly."),
    ("The reward went up.", "The model's answers improved."),
    ("The layout is the same for every version.", "Shapes and places of tensors do not change."),
    ("Tensor parallelism cuts a matrix.", "Each rank holds some of the columns."),
    ("The message is kept on the stream.", "Who comes later can still read it."),
    ("The trace shows where time went.", "Every stage of the update is measured."),
    ("Nothing waits without a deadline.", "Each wait ends after a stated time."),
)
"""Each pair is a positive; the other pairs of its batch are its negatives."""
