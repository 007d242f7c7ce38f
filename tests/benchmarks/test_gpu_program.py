"""What is read off a program that was compiled for a GPU, on a small one whose bytes are counted by
hand."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import gpu_program
import pytest

SPEED = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"


# Two steps' worth of what XLA prints: rows [8] gathered, halved and added back to a table [100, 4].
PROGRAM = """HloModule jit_program, is_scheduled=true

%fused_rows (param_0: f32[100,4], param_1: s32[8]) -> f32[8,1,4] {
  %param_0 = f32[100,4]{1,0} parameter(0)
  %param_1 = s32[8]{0} parameter(1)
  %bitcast.1 = s32[8,1]{1,0} bitcast(%param_1)
  ROOT %gather.1 = f32[8,1,4]{2,1,0} gather(%param_0, %bitcast.1), slice_sizes={1,4}
}

%fused_scatter (param_0.1: f32[100,4], param_1.1: s32[8], param_2: f32[8,1,4]) -> f32[100,4] {
  %param_0.1 = f32[100,4]{1,0} parameter(0)
  %param_1.1 = s32[8]{0} parameter(1)
  %param_2 = f32[8,1,4]{2,1,0} parameter(2)
  %half = f32[8,1,4]{2,1,0} multiply(%param_2, %param_2)
  %bitcast.2 = s32[8,1]{1,0} bitcast(%param_1.1)
  ROOT %scatter.1 = f32[100,4]{1,0} scatter(%param_0.1, %bitcast.2, %half), to_apply=%add
}

%fused_count (param_0.2: s32[]) -> s32[] {
  %param_0.2 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %add.1 = s32[] add(%param_0.2, %one)
}

%body (arg: (s32[], f32[100,4], /*index=2*/s32[8])) -> (s32[], f32[100,4], s32[8]) {
  %arg = (s32[], f32[100,4]{1,0}, /*index=2*/s32[8]{0}) parameter(0)
  %number = s32[] get-tuple-element(%arg), index=0
  %table = f32[100,4]{1,0} get-tuple-element(%arg), index=1
  %ids = s32[8]{0} get-tuple-element(%arg), index=2
  %rows = f32[8,1,4]{2,1,0} fusion(%table, %ids), kind=kLoop, calls=%fused_rows
  %new = f32[100,4]{1,0} fusion(%table, %ids, %rows), kind=kInput, calls=%fused_scatter
  %next = s32[] fusion(%number), kind=kLoop, calls=%fused_count
  ROOT %out = (s32[], f32[100,4]{1,0}, s32[8]{0}) tuple(%next, %new, %ids)
}

ENTRY %main (a: f32[100,4], b: s32[8]) -> f32[100,4] {
  %a = f32[100,4]{1,0} parameter(0)
  %b = s32[8]{0} parameter(1)
  %zero = s32[] constant(0)
  %copy.1 = f32[100,4]{1,0} copy(%a)
  %start = (s32[], f32[100,4]{1,0}, s32[8]{0}) tuple(%zero, %copy.1, %b)
  %loop = (s32[], f32[100,4]{1,0}, s32[8]{0}) while(%start), condition=%less, body=%body
  ROOT %found = f32[100,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_copies_and_bytes_of_a_small_program():
    found = gpu_program.facts(PROGRAM, 8, {"f32[100,4]"})
    ids, rows = 8 * 4, 8 * 4 * 4
    gathered = ids + 2 * rows  # read where they lie, and written out
    scattered = ids + rows + 2 * rows  # what is added; the table's rows read and written
    assert found == {
        "kernels": 3,
        "small": 1,
        "sorts": 0,
        "table copies": 1,
        "bytes": round((gathered + scattered) / 8),
    }


def test_shapes_of_tuples_and_of_halves():
    (op,) = gpu_program._ops("  %x = (u16[3,2]{1,0}, pred[5]{0}, f32[]) fusion(%a), calls=%b\n")
    assert (op.kind, op.operands, op.bytes) == ("fusion", ("a",), 3 * 2 * 2 + 5 + 4)


@pytest.mark.parametrize("described", [False, True])
def test_what_is_missing_is_one_line(tmp_path, described):
    target = tmp_path / "h200.txtpb"
    if described:
        target.write_text("not a description")
    command = [sys.executable, str(SPEED / "gpu_program.py"), f"--target={target}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    why = "JAX cannot compile for a GPU here: " if described else "No such file or directory"
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
