# source scripts/setup_runtime_env.sh
# shellcheck shell=bash
#
# The environment of runs on a machine that is set up for them. Caches of models, data, kernels and packages go into one folder,
# DIFFTRAIN_CACHE (default: .cache of the current folder), so that a job finds what the one before it fetched. cuBLAS is told to
# be deterministic before anything starts it, as train.deterministic does for itself. Where the official hub does not answer, and HF_MIRROR
# names another one, HF_ENDPOINT becomes that: it gets the hub's token, so there is none by default. What is set already stays.

export DIFFTRAIN_CACHE="${DIFFTRAIN_CACHE:-$PWD/.cache}"
export HF_HOME="${HF_HOME:-$DIFFTRAIN_CACHE/huggingface}"
export TORCH_HOME="${TORCH_HOME:-$DIFFTRAIN_CACHE/torch}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$DIFFTRAIN_CACHE/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$DIFFTRAIN_CACHE/triton}"
export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$DIFFTRAIN_CACHE/pip}"
mkdir -p "$HF_HOME" "$TORCH_HOME" "$TORCHINDUCTOR_CACHE_DIR" "$TRITON_CACHE_DIR" "$PIP_CACHE_DIR"

export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

if [ -z "${HF_ENDPOINT:-}" ] && [ "${HF_HUB_OFFLINE:-0}" != 1 ]; then
    if ! curl --silent --fail --head --max-time 10 --output /dev/null https://huggingface.co; then
        if [ -n "${HF_MIRROR:-}" ] && curl --silent --fail --head --max-time 10 --output /dev/null "$HF_MIRROR"; then
            export HF_ENDPOINT="$HF_MIRROR"
            echo "https://huggingface.co does not answer: HF_ENDPOINT is $HF_MIRROR" >&2
        else
            echo "https://huggingface.co does not answer: models and data have to be in $HF_HOME, or folders (HF_MIRROR names a mirror)" >&2
        fi
    fi
fi
