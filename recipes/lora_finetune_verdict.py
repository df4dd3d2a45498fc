"""What a run of `phi3_plugin.recipes.lora_finetune` says of the adapters that it saves."""

from pathlib import Path

from phi3_plugin.recipes.phi3_adapter import proven

from phi3_plugin.checkpoint.check import LOADS, verdicts
from phi3_plugin.checkpoint.peft import load_origin

MEMINFO = Path("/proc/meminfo")


def served_by(folder: Path) -> str:
    """Return one line: what each runtime makes of an adapter that was just saved.

    Args:
        folder: Whole and in its place.
    """
    words = []
    for verdict in verdicts(folder):
        why = "" if verdict.status == LOADS else f" ({verdict.reasons[0]})"
        words.append(f"{verdict.runtime} {verdict.status}{why}")
    return f"{folder.name}: {', '.join(words)}."


def proof(folder: Path, checkpoint_dir: Path) -> str:
    """Return one line: how far PEFT's logits are from ours; or why that cannot be said.

    It takes the base model twice, one after the other, in fp32 and on the CPU. So it is left to
    the user where memory might not suffice; whatever goes wrong, the adapter is saved.

    Args:
        folder: Of the adapter.
        checkpoint_dir: Of its base.
    """
    command = f"phi3-tune adapter check {folder} --base {checkpoint_dir}"
    if load_origin(folder).get("lora_init") == "loftq":
        return "No proof: the adapter belongs to the NF4 base it was trained over."
    needed, free = memory_needed(checkpoint_dir), memory_free()
    if free is not None and free < needed:
        return f"No proof: PEFT would take {needed / 1e9:.0f} GB of memory: {command}"
    try:
        return proven(checkpoint_dir, folder, "fp32")[2]
    except Exception as error:  # of transformers and PEFT, whose models may be newer than they
        return f"No proof: {type(error).__name__}: {error}"


def memory_needed(checkpoint_dir: Path) -> int:
    """Return how many bytes a model takes in fp32, with the files that are read meanwhile."""
    stored = sum(file.stat().st_size for file in checkpoint_dir.glob("*.safetensors"))
    return 3 * stored  # bf16 becomes fp32, beside pages of the files


def memory_free() -> int | None:
    """Return how many bytes can be taken, where the system says so."""
    if not MEMINFO.is_file():
        return None
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None
