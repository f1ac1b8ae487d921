"""The process in which vLLM runs, started by vllm_engine.py: `python -m … ARGUMENTS FD`.

Reads lines of JSON from standard input: {"id", "prompt_ids", "max_new_tokens", "seed"} adds a request, {"run": true}
answers all of them. Writes to FD: {"ready": true}, {"id", "token_ids", "cached"} for each answer as it is finished, and
{"alive": true} now and then while it works.
"""

import ctypes
import json
import signal
import sys
import time
from typing import Any, Final, TextIO

_SIGN_OF_LIFE_S: Final = 2.0
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    arguments = json.loads(sys.argv[1])
    with open(int(sys.argv[2]), "w", encoding="utf-8") as results:
        # a killed parent takes this process along, and the GPU's memory with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        engine = _load(arguments)
        _tell(results, {"ready": True})
        for line in sys.stdin:
            message = json.loads(line)
            if "run" in message:
                _run(engine, results)
            else:
                _add(engine, message, arguments)


def _load(arguments: dict[str, Any]) -> Any:
    from vllm import LLM

    # A block that is longer than the shared caption would hide the prefix from the cache; on CPUs 32 is the shortest.
    # A prompt cut into chunks has its random numbers set back, which vLLM cannot do on a CPU: the engine ends by it.
    on_cpu: dict[str, Any] = {
        "enforce_eager": True,
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, arguments["max_model_len"]),
    }
    llm = LLM(
        arguments["model"],
        dtype=arguments["dtype"],
        max_model_len=arguments["max_model_len"],
        max_num_seqs=arguments["max_num_seqs"],
        enable_prefix_caching=arguments["prefix_caching"],
        tensor_parallel_size=arguments["tensor_parallel_size"],
        gpu_memory_utilization=arguments["gpu_memory_utilization"],
        skip_tokenizer_init=True,
        trust_remote_code=False,
        generation_config="vllm",  # no defaults of the model's own: variant 0 is greedy and nothing else
        seed=0,
        **(on_cpu if arguments["cpu"] else {}),
    )
    return llm.llm_engine


def _add(engine: Any, message: dict[str, Any], arguments: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampled = message["seed"] is not None
    engine.add_request(
        str(message["id"]),
        TokensPrompt(prompt_token_ids=message["prompt_ids"]),
        SamplingParams(
            temperature=arguments["temperature"] if sampled else 0.0,
            seed=message["seed"],
            max_tokens=message["max_new_tokens"],
            stop_token_ids=arguments["end_ids"],
            ignore_eos=True,  # stop_token_ids are all the ends there are, the model's own among them
            detokenize=False,
        ),
    )


def _run(engine: Any, results: TextIO) -> None:
    told = time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answer = {
                    "id": int(output.request_id),
                    "token_ids": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens or 0,
                }
                _tell(results, answer)
        if time.monotonic() - told > _SIGN_OF_LIFE_S:
            told = time.monotonic()
            _tell(results, {"alive": True})


def _tell(results: TextIO, message: dict[str, Any]) -> None:
    results.write(json.dumps(message) + "\n")
    results.flush()


if __name__ == "__main__":
    main()
