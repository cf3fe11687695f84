"""All that was found -> one sentence: what does not work, or what is best here."""

from collections.abc import Mapping, Sequence

from microtome.doctor.facts import Facts
from microtome.doctor.findings import Line, Result
from microtome.doctor.packages import EXTRAS

# A shorter step is a gain; less than this is noise.
LEAST_GAIN = 1.1


def verdict(facts: Facts, lines: Sequence[Line], result: Result | None) -> str:
    """One sentence.

    Args:
        facts: of the machine.
        lines: all that was found, the self-test's parts included.
        result: of the self-test; None: there was none.
    """
    failed = [line.what for line in lines if line.level == "bad"]
    if failed:
        return f"Something does not work here: {', '.join(failed)}; do what the lines marked so say."
    parts = ["All is well: the whole road works here" if result else "Nothing is in the way, as far as can be seen without the self-test"]
    if result and result.tile_seconds:
        parts.append(_fastest(result.tile_seconds))
    if not (facts.extras["fast"][0].version and facts.extras["fast"][1].version):
        parts.append(f'[fast] is missing, which {EXTRAS[0].purpose}: pip install "microtome[fast]"')
    side = facts.torch.get("patch_vox")
    if side:
        parts.append(f"3D patches up to {side} × {side} × {side} fit")
    parts.append(_bf16(facts, result.step_seconds if result else {}))
    return "; ".join(parts) + "."


def _fastest(tile_seconds: Mapping[str, float]) -> str:
    """Which engine was fastest, and against what."""
    best = min(tile_seconds, key=lambda name: tile_seconds[name])
    reference = tile_seconds.get("torch")
    if best == "torch" or reference is None:
        return f"{best} predicts fastest of what is installed"
    return f"{best} predicts fastest, {reference / tile_seconds[best]:.1f} times as fast as torch on the self-test's small network"


def _bf16(facts: Facts, step_seconds: Mapping[str, float]) -> str:
    """Whether bfloat16 helps: as measured, or as the hardware promises."""
    if {"bf16", "fp32"} <= set(step_seconds):
        gain = step_seconds["fp32"] / step_seconds["bf16"]
        return f"bfloat16 trains {gain:.1f} times as fast as float32" if gain >= LEAST_GAIN else "bfloat16 does not train faster here"
    if facts.bf16 or any(gpu["bf16"] for gpu in facts.torch.get("gpus", [])):
        return "bfloat16 is multiplied in hardware"
    return "there is no bfloat16, so training and prediction keep to float32"
