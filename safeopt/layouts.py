"""Parameter layouts that a guard cannot see through: refused, with the way out."""

from __future__ import annotations

from torch import Tensor, nn

FSDP1 = (
    "FSDP1 (FullyShardedDataParallel) flattens parameters, so a guard cannot tell which weight is "
    "which; use FSDP2 (torch.distributed.fsdp.fully_shard; fsdp_version: 2 in Accelerate) or DDP"
)
ZERO = (
    "DeepSpeed ZeRO flattens and partitions parameters, so a guard cannot tell which weight is "
    "which; use DDP, or FSDP2 (torch.distributed.fsdp.fully_shard) where memory is short"
)


def refuse_flattened(model: nn.Module) -> None:
    """Raise if FSDP1 or DeepSpeed ZeRO holds parameters of ``model``.

    Args:
        model: the model, wrapped or not.

    Raises:
        ValueError: says why it cannot be guarded and what to use instead.
    """
    # By name: neither library is imported just to learn that it is not in use.
    classes = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    parameters = list(model.parameters())
    if "FullyShardedDataParallel" in classes or any(
        hasattr(p, "_fsdp_flattened") or hasattr(p, "_is_flat_param") for p in parameters
    ):
        raise ValueError(FSDP1)
    if "DeepSpeedEngine" in classes or any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(ZERO)


def flattened_hint(parameter: Tensor) -> str:
    """What a parameter that no model knows may be: ZeRO-1, ZeRO-2 and FSDP1 step flat buffers."""
    if parameter.ndim != 1:
        return ""
    return (
        ". If DeepSpeed or FSDP1 made this flat buffer of the parameters: neither can be guarded, "
        "use DDP or FSDP2 (torch.distributed.fsdp.fully_shard)"
    )
