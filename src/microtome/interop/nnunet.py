"""Names in nnU-Net's checkpoints -> ours: its plain U-Net and its residual encoder are `nnunet_plain` and `nnunet_resenc`.

As the checkpoints of nnU-Net 2 name them (the package dynamic_network_architectures); deepest decoder level first, ours finest first:

    encoder.stages.S.0.convs.N.{conv,norm}          encoder.S.N.{0,1}
    encoder.stem.convs.0.{conv,norm}                stem.{0,1}
    encoder.stages.S.blocks.N.conv{1,2}.{conv,norm} encoder.S.N.{first,second}.{0,1}
    encoder.stages.S.blocks.N.skip.K.{conv,norm}    encoder.S.N.shortcut.{K,K+1}
    decoder.stages.D.convs.N.{conv,norm}            decoder.(last - D).N.{0,1}
    decoder.transpconvs.D                           up.(last - D)
    decoder.seg_layers.D                            heads.(last - D)

The same tensors stand there again under `all_modules` and `decoder.encoder`; those names are not needed.
"""

import re
from collections.abc import Callable, Iterable

_NAME = r"\.(?P<kind>weight|bias|running_mean|running_var|num_batches_tracked)"
_Rule = tuple[re.Pattern[str], Callable[[re.Match[str], int], str]]


def _part(kind: str | None) -> int:
    """Where a convolution and its norm stand in ours."""
    return ("conv", "norm").index(kind or "")


def _rule(pattern: str, name: Callable[[re.Match[str], int], str]) -> _Rule:
    return re.compile(pattern + _NAME), name


_RULES: tuple[_Rule, ...] = (
    _rule(r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(conv|norm)", lambda m, _: f"encoder.{m[1]}.{m[2]}.{_part(m[3])}"),
    _rule(r"encoder\.stem\.convs\.0\.(conv|norm)", lambda m, _: f"stem.{_part(m[1])}"),
    _rule(
        r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv([12])\.(conv|norm)",
        lambda m, _: f"encoder.{m[1]}.{m[2]}.{('first', 'second')[int(m[3]) - 1]}.{_part(m[4])}",
    ),
    _rule(
        r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.(\d+)\.(conv|norm)",
        lambda m, _: f"encoder.{m[1]}.{m[2]}.shortcut.{int(m[3]) + _part(m[4])}",
    ),
    _rule(r"decoder\.stages\.(\d+)\.convs\.(\d+)\.(conv|norm)", lambda m, last: f"decoder.{last - int(m[1])}.{m[2]}.{_part(m[3])}"),
    _rule(r"decoder\.transpconvs\.(\d+)", lambda m, last: f"up.{last - int(m[1])}"),
    _rule(r"decoder\.seg_layers\.(\d+)", lambda m, last: f"heads.{last - int(m[1])}"),
)


def our_names(theirs: Iterable[str]) -> dict[str, str]:
    """Their names -> ours, of those that we have too; empty where they are not nnU-Net's."""
    names = list(theirs)
    levels = [int(found[1]) for name in names if (found := re.fullmatch(r"decoder\.transpconvs\.(\d{1,3})\.weight", name))]
    if not levels or not any(name.startswith(("encoder.stages.", "encoder.stem.")) for name in names):
        return {}
    last = max(levels)
    pairs = ((name, _ours(name, last)) for name in names)
    return {name: ours for name, ours in pairs if ours}


def _ours(name: str, last: int) -> str:
    """Our name for one of theirs; empty where we have none."""
    for pattern, rule in _RULES:
        if found := pattern.fullmatch(name):
            return f"{rule(found, last)}.{found['kind']}"
    return ""
