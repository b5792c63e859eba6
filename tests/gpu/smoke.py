"""(a) Sixty seconds on the GPU host: runs the `gpu` tests and one step of every stage and mode, and says what the
machine is. Writes smoke.json and smoke.txt to --out. Of the kit it needs the packages alone, which come in its first
part.

    python tests/gpu/smoke.py --out "$OUT"       # --rehearse: on a CPU, to its end
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=240, help="after which the tests are killed")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    env = os.environ | {"PYTHONPATH": str(ROOT), "VOCABSHRINK_REHEARSE": "1" if arguments.rehearse else "0"}
    options = ["-m", "gpu", "-q", "-rA", "--tb=short", "--durations=10", "-p", "no:cacheprovider", "-W", "ignore"]
    log = arguments.out / "smoke.txt"
    with log.open("w") as file:
        command = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests/gpu")]
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, timeout=arguments.seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    said = {"device": device, "torch": torch.__version__, "pytest": code, "seconds": round(time.time() - began, 1)}
    (arguments.out / "smoke.json").write_text(json.dumps(said, indent=1))
    print(log.read_text()[-8000:])
    print(json.dumps(said))
    sys.exit(code != 0)


if __name__ == "__main__":
    main()
