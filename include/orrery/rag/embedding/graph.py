"""Make an embedder's graph: weights in, ONNX with pooling and normalisation inside out. A process of its own.

    python -m orrery.rag.embedding.graph SOURCE TARGET FACTS

torch and its exporter take a gigabyte, and warn of what nobody can change: both end with this process. What is wrong
with the model is told on standard error's last line, as JSON, with exit code 64.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from orrery.errors import BUG, USER, SpecError
from orrery.parent import follow_parent
from orrery.rag.embedding.session import FACTS, MODEL, TOKENIZER, Embedder, Facts

# fp32: another order of summation. int8: seen 0.985 to 0.995 on MiniLM; below, something is broken.
ALIKE = {"fp32": 0.9999, "int8": 0.95}
SAME = 1e-4  # of a vector of length 1, in each of its numbers: another order of summation
OPSET = 20
PROBES = (
    "A step that was killed leaves nothing half-visible.",
    "backup",
    "How do I roll back to the version that was live yesterday? " * 4,
    "Orrery keeps machine-learning models turning: " + "validate, train, evaluate, gate, promote and score. " * 12,
)


def main(argv: list[str]) -> int:
    """Make the graph, and compare it with torch; return an exit code."""
    follow_parent()
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    source, target, told = Path(argv[0]), Path(argv[1]), json.loads(argv[2])
    try:
        make(source, target, Facts(**{**told, "inputs": tuple(told["inputs"])}))
    except SpecError as e:
        sys.stderr.write("\n" + json.dumps({"message": e.message, "hint": e.hint}) + "\n")
        return USER
    return 0


def make(source: Path, target: Path, facts: Facts) -> None:
    """Write an embedder's three files to `target`. Raises `SpecError` when the graph does not do what torch does."""
    import shutil

    model, width = load(source, facts)
    facts = Facts(**{**facts.told(), "inputs": facts.inputs, "dimensions": width})
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    plain = target / ("plain.onnx" if facts.precision == "int8" else MODEL)
    _export(model, plain)
    (target / FACTS).write_text(json.dumps(facts.told(), sort_keys=True, indent=1) + "\n")
    if facts.precision == "int8":
        _quantize(plain, target / MODEL)
        plain.unlink()
    else:
        _fuse(target, int(getattr(model.encoder.config, "num_attention_heads", 0)))
    _compare(model, Embedder.open(target))


def load(source: Path, facts: Facts) -> tuple[Any, int]:
    """Return the torch module, token ids and mask in, vectors out; and how long a vector is."""
    import torch
    from transformers import AutoModel

    try:
        # Eager attention: its graph is plain operators, which onnxruntime fuses by itself.
        encoder = AutoModel.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, attn_implementation="eager", dtype=torch.float32
        ).eval()
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise SpecError(
            f"embedder.model: transformers cannot load {source}: {str(e).splitlines()[0]}",
            hint="an encoder in Hugging Face's layout that needs no code of its own",
        ) from None

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            if facts.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled, p=2.0, dim=1)

    return Pooled().eval(), int(encoder.config.hidden_size)


def _export(model: Any, target: Path) -> None:
    import torch

    example = (torch.ones((2, 8), dtype=torch.int64), torch.ones((2, 8), dtype=torch.int64))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        model,
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=["input_ids", "attention_mask"],
        output_names=["vectors"],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        external_data=False,
        verbose=False,
    )
    program.save(str(target), external_data=False)


def _quantize(plain: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(plain))
    # The exporter's own shapes contradict what quantization infers: ShapeInferenceError.
    del model.graph.value_info[:]
    quantize_dynamic(model, str(target), weight_type=QuantType.QInt8, per_channel=True)


def _fuse(target: Path, heads: int) -> None:
    """Make each attention of the exported graph one operator, where its vectors stay the same."""
    import numpy as np

    from orrery.rag.embedding.fusing import fuse

    fused = target / "fused.onnx"
    if not heads or not fuse(target / MODEL, fused, heads):
        return
    plain = Embedder.open(target)
    # The last is as long as a text may be: what is masked by a window is not seen on short ones.
    probes = [*PROBES, " ".join(PROBES) * (plain.limit // 8 + 1)]
    wanted = plain.embed(probes)
    aside = (target / MODEL).rename(target / "plain.onnx")
    fused.rename(target / MODEL)
    if np.abs(Embedder.open(target).embed(probes) - wanted).max() > SAME:
        aside.replace(target / MODEL)
    aside.unlink(missing_ok=True)


def _compare(model: Any, made: Embedder) -> None:
    """Raise `SpecError` unless the graph's vectors are those of torch, for short and long texts in one batch."""
    import numpy as np
    import torch

    ours = made.embed(PROBES)
    encoded = [made.cut([text])[0] for text in PROBES]
    with torch.inference_mode():
        for row, ids in enumerate(encoded):
            tokens = torch.tensor(ids[None])
            theirs = model(tokens, torch.ones_like(tokens))[0].numpy()
            cosine = float(np.dot(ours[row], theirs))
            if not cosine > ALIKE[made.facts.precision]:
                raise SpecError(
                    f"embedder.model: exported in {made.facts.precision}, its vectors are not torch's (cosine "
                    f"{cosine:.5f}, at least {ALIKE[made.facts.precision]})",
                    hint="precision: fp32" if made.facts.precision == "int8" else "use another model",
                )


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except MemoryError:
        raise SystemExit(BUG) from None
