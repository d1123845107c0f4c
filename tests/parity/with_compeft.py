"""ComPEFT beside its authors' code: the values of a compressed LoRA and IA³."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

from parity.comparison import Comparison, Difference
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_peft.stack.adapter_files.compression import Deviation, compress_adapter
from lightning_peft.stack.adapter_files.folder import read_folder

FOLDER = Path(__file__).parent / "fixtures/compeft"
RECORD = json.loads((FOLDER / "cases.json").read_text())
FUNCTIONS = {
    ("lora", "all"): "get_compressed_lora_weights",
    ("ia3", "all"): "compress_and_update_parms",
    ("lora", "kept"): "replace_noise_and_constant (unused there)",
    ("ia3", "kept"): "replace_noise_and_constant (unused there)",
}
NOTE = "the peer keeps int(density * N) + 1 entries and all ties, here round(density * N): density set to theirs"


def comparisons() -> list[Comparison]:
    """Return a row for each method and each standard deviation."""
    rows = []
    for (method, deviation), function in FUNCTIONS.items():
        peer = f"ComPEFT {RECORD['commit'][:7]}, {function}"
        difference = partial(compare, method, deviation)
        rows.append(Comparison(f"compress --std {deviation}, {method}", peer, "bert", difference, note=NOTE))
    return rows


def compare(method: str, deviation: Deviation) -> Difference:
    """Return the largest difference of a value in any case, over the largest value."""
    stored = load_file(FOLDER / f"{method}.safetensors")
    apart = [
        difference(stored, f"{number}.{deviation}.", compressed(method, stored, case, deviation))
        for number, case in enumerate(RECORD["cases"])
    ]
    return Difference(max(apart))


def difference(stored: dict[str, Tensor], prefix: str, made: dict[str, Tensor]) -> float:
    theirs = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    assert made.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    return max(float((made[name] - value).abs().max()) for name, value in theirs.items()) / largest


def compressed(
    method: str, stored: dict[str, Tensor], case: dict[str, float], deviation: Deviation
) -> dict[str, Tensor]:
    """Compress the stored adapter with as many entries kept as the peer keeps, and read it again."""
    from peft import IA3Config, LoraConfig

    tuned = {name.removeprefix("tuned."): value for name, value in stored.items() if name.startswith("tuned.")}
    entries = sum(value.numel() for value in tuned.values())
    config = {"lora": LoraConfig, "ia3": IA3Config}[method](**RECORD["configs"][method])
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "plain", Path(folder) / "small"
        config.save_pretrained(str(plain))
        save_file(tuned, plain / "adapter_model.safetensors")
        density = (int(entries * (case["k"] / 100)) + 1) / entries
        (numbers,) = compress_adapter(plain, small, density, case["alpha"], deviation)
        assert numbers.kept == round(density * entries)
        return read_folder(small)[1]
