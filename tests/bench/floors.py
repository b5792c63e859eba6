"""The tables of docs/performance.md: FLOPs and bytes of a step, and the floor that they give.

python tests/bench/floors.py            # the tables; --here also measures this machine's own matrix product
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import BertConfig

from vocabshrink.stages.plan import flops_per_piece, matrix_speed, parameters

MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
BASE = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
NARROW = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8}
PAIRS = {  # name -> (teacher, student), pieces of a sequence
    "minilm_7mb": (BertConfig(**MINILM), BertConfig(**MINILM | {"intermediate_size": 768}, vocab_size=15_000), 32),
    "12 x 768 -> 6 x 256": (BertConfig(**BASE), BertConfig(**NARROW, vocab_size=5_000), 64),
}
# (FLOP/s in bf16, bytes a second). H100: NVIDIA's data sheet, SXM, dense. Cores: 0.55 TFLOP/s each, as --here measured
# on a busy Xeon with AMX, and a guess at their share of its memory
MACHINES = {"H100": (989e12, 3.35e12), "two cores": (1.1e12, 20e9)}
ADAMW = 36  # bytes a parameter and step: weight 4 + 4, gradient 4 + 4, two moments 8 + 8, and the bf16 copy 4


def layer_bytes(config: BertConfig, *, pure: bool = False) -> int:
    """Bytes that a token moves in a layer's forward pass, kernel by kernel and nothing fused: under autocast each
    product casts its input, and layer norms and the residual stream are float32; `pure`: all of it in bfloat16."""
    width, inner = config.hidden_size, config.intermediate_size
    return (48 if pure else 88) * width + 8 * inner


def costs(teacher: BertConfig, student: BertConfig, length: int, pure: bool = False) -> dict[str, float]:
    """Of one token: FLOPs and activation bytes of the teacher's pass and of the student's with gradients, three times a
    forward pass; and the bytes of a step whatever its size: every weight, gradient and moment once."""
    moved = [config.num_hidden_layers * layer_bytes(config, pure=pure) for config in (teacher, student)]
    flops = [flops_per_piece(config, length) for config in (teacher, student)]
    weights = parameters(teacher)["layers"] * (2 if pure else 8)
    table = student.vocab_size * student.hidden_size
    return {
        "teacher_flops": flops[0],
        "student_flops": 3 * flops[1],
        "bytes": moved[0] + 3 * moved[1],
        "step_bytes": weights + ADAMW * (parameters(student)["layers"] + table),
    }


def floor(found: dict[str, float], machine: tuple[float, float], tokens: int) -> tuple[float, float]:
    """Tokens a second that arithmetic allows, and those that memory allows in steps of so many tokens."""
    speed, bandwidth = machine
    compute = speed / (found["teacher_flops"] + found["student_flops"])
    return compute, bandwidth / (found["bytes"] + found["step_bytes"] / tokens)


def tables() -> str:
    """Both tables in Markdown."""
    lines = [
        "| | teacher, MFLOP a token | student, MFLOP | KB a token, autocast | all bf16 | MB a step |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (teacher, student, length) in PAIRS.items():
        found, pure = costs(teacher, student, length), costs(teacher, student, length, pure=True)
        figures = (
            f"{found['teacher_flops'] / 1e6:.1f}",
            f"{found['student_flops'] / 1e6:.1f}",
            f"{found['bytes'] / 1e3:,.0f}",
            f"{pure['bytes'] / 1e3:,.0f}",
            f"{found['step_bytes'] / 1e6:,.0f}",
        )
        lines.append(f"| {name} | {' | '.join(figures)} |")
    lines += [
        "",
        "| tokens a second at most | a step of | arithmetic | memory, autocast | memory, all bf16 |",
        "|---|--:|--:|--:|--:|",
    ]
    for machine, limits in MACHINES.items():
        for name, (teacher, student, length) in PAIRS.items():
            tokens = 131_072 if machine == "H100" else 8_192
            found, pure = costs(teacher, student, length), costs(teacher, student, length, pure=True)
            (compute, memory), (_, fast) = (floor(some, limits, tokens) for some in (found, pure))
            lines.append(f"| {machine}, {name} | {tokens:,} | {compute:,.0f} | {memory:,.0f} | {fast:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="measure this machine's matrix product, a second")
    print(tables())
    if parser.parse_args().here:
        print(f"\nthis machine: {matrix_speed() / 1e12:.2f} TFLOP/s in bf16")
