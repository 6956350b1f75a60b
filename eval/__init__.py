"""The paper's benchmarks. `python -m eval --model OUT/model --tasks mmlu,hellaswag --data FOLDER`; the scorer is `score.py`."""
