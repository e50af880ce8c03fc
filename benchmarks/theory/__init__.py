"""The theory, measured: the drift of anchors without a guard, with a projector, with refresh."""
