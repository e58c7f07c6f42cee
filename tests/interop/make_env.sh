#!/bin/sh
# An environment with GPTQModel, for check_gptq.py: sh tests/interop/make_env.sh FOLDER [PYTHON]
# GPTQModel 7.7 asks for torch>=2.14.1 and would bring CUDA with it; it works with 2.13 on a CPU, so it is put in without its pins.
# On a machine with two cores it needs GPTQMODEL_CPU_WORKERS=2 in the environment (check_gptq.py sets it).
set -e
[ -n "$1" ] || { echo "usage: make_env.sh FOLDER [PYTHON]" >&2; exit 2; }
"${2:-python3}" -m venv "$1"
pip="$1/bin/python -m pip"
$pip install -q --upgrade pip setuptools wheel ninja packaging
$pip install -q torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} # set TORCH_INDEX to the index of torch's CPU wheels to do without CUDA
$pip install -q transformers==5.23.0 optimum==2.3.0 'accelerate>=1.15' 'safetensors>=0.8' 'datasets>=5.1' 'torchao>=0.18' 'pillow>=13' 'protobuf>=7.36.2' \
    'device-smi>=0.5.7' 'tokenicer>=0.0.14' 'logbar>=0.4.15' 'pypcre>=0.6.4' 'defuser>=0.0.28' 'threadpoolctl>=3.7' 'jinja2>=3.1.6' 'dill>=0.4.1' 'pyarrow>=26' 'requests>=2.34' torch==2.13.0
$pip install -q --no-deps --no-build-isolation gptqmodel==7.7.0
GPTQMODEL_CPU_WORKERS=2 "$1/bin/python" -c "import torch, gptqmodel, optimum, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
