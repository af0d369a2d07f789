#!/bin/sh
# Installs torch for the tests. Without an NVIDIA GPU it takes the CPU build: gigabytes smaller.
# usage: install_torch.sh PYTHON
set -eu
python=$1
version=2.13.0
pip="$python -m pip --disable-pip-version-check install --quiet"

if "$python" -c 'import torch' 2>/dev/null; then
    exit 0
fi
if [ -e /dev/nvidiactl ] || [ "$(uname -s)" != Linux ]; then
    exec $pip "torch>=2.11"
fi
echo "no NVIDIA GPU here: installing the CPU build of torch"
# Deliberately quick to give up: where PyTorch's index cannot be reached, pip's own configuration decides.
$pip --timeout 5 --retries 0 --index-url https://download.pytorch.org/whl/cpu "torch==$version" 2>/dev/null ||
    $pip "torch==$version"
