#!/bin/sh
# An environment with llm-compressor, for run_llmcompressor.py: sh tests/interop/peers/make_env.sh FOLDER [PYTHON]
# It has to be one of its own: llm-compressor 0.14 asks for transformers<=5.17 and huggingface_hub<2. About 1.5 GB with a torch without CUDA,
# which pip takes from wherever PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS points. Then give FOLDER/bin/python to run_all.sh.
set -eu
folder=${1:?usage: make_env.sh FOLDER [PYTHON]}
"${2:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install -q torch==2.13.0 llmcompressor==0.14.0.1
"$folder/bin/python" -c 'import llmcompressor as l, torch, transformers as t; print("llmcompressor", l.__version__, "torch", torch.__version__, "transformers", t.__version__)'
