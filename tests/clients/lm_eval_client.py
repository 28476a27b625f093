"""lm-evaluation-harness, tasks of a folder: python lm_eval_client.py URL TOKENIZER FOLDER MODEL..."""

import json
import os
import sys

os.environ["HF_HOME"] = sys.argv[3]
os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

url, tokenizer, folder, *models = sys.argv[1:]
os.chdir(folder)  # the tasks name their data relative to it
found = {}
for number, model in enumerate(models):
    arguments = {"model": model, "base_url": f"{url}v1/completions", "tokenizer": tokenizer, "max_length": 512}
    evaluated = simple_evaluate(
        model="local-completions",
        model_args={**arguments, "num_concurrent": 1 + 3 * number},  # several requests at a time, or prompts in one
        batch_size=4 - 3 * number,
        tasks=["capitals", "written", "perplexity"],
        task_manager=TaskManager(include_path=folder),
        log_samples=True,
        bootstrap_iters=0,
    )
    asked = [
        (sample["arguments"], sample["resps"]) for name in evaluated["samples"] for sample in evaluated["samples"][name]
    ]
    found[model] = {
        "accuracy": evaluated["results"]["capitals"]["acc,none"],
        "scores": [
            [list(pair), answer[0]] for pairs, answers in asked for pair, answer in zip(pairs, answers, strict=True)
        ],
    }
print(json.dumps(found))
