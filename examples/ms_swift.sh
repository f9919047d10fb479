#!/usr/bin/env bash
# ms-swift: the last two arguments measure a training.
set -euo pipefail
plugins=$(python -c "import inflection_fast.integrations.plugins as p; print(p.__path__[0])")
swift sft --model HuggingFaceTB/SmolLM2-135M --dataset AI-ModelScope/alpaca-gpt4-data-en --output_dir runs/ms-swift \
  --external_plugins "$plugins/inflection_swift.py" --callbacks inflection
