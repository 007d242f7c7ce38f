"""What `checkouts.py` asks of a checkout, with the checkout's own code.

    checkouts_child.py FOLDER data SIZE PLACE                  pairs and a teacher into PLACE
    checkouts_child.py FOLDER config SIZE PLACE BATCH GUIDED   a worker's config on standard output
    checkouts_child.py FOLDER serve                            the worker, by processor time

FOLDER is where the checkout has its worker.py; names that changed between checkouts are looked up.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types

FOLDER, ACTION, *REST = sys.argv[1:]
sys.path[0] = FOLDER  # its turns.py and synthetic.py, not those beside this file

if ACTION == "data":
    import synthetic
    import synthetic_dataset

    size, place = REST
    os.makedirs(place)
    pairs = synthetic.make(synthetic.SIZES[size])
    pairs.save(place)
    write = getattr(synthetic_dataset, "write_teachers", None) or synthetic_dataset.write_teacher
    write(synthetic_dataset.from_pairs(pairs, place))
elif ACTION == "config":
    from slgr_jax.config import GUIDANCE

    try:
        import cases
    except ImportError:
        import throughput as cases
    try:
        from slgr_jax.config import knobs
    except ImportError:
        from slgr_jax import knobs
    size, place, batch, guided = REST
    pairwise = next(name for name in ("pairwise", "selective") if name in GUIDANCE)
    guidance = pairwise if int(guided) else "none"
    case = cases.Case(size, "mf", guidance, "float32", int(batch))
    print(json.dumps(json.loads(knobs.to_json(case.config({}, place)))))
else:
    import turns
    import worker

    worker.time = types.SimpleNamespace(perf_counter=time.process_time)
    turns.serve(worker.prepare)
