"""What the TPU's benchmark reads out of compiled programs, against direct counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tpu.chips import CHIPS, roofline
from benchmarks.tpu.counting import Costs, convolution_flops, costs
from benchmarks.tpu.hlo import Module, shapes_of

A = jnp.ones((4, 4))


def counted(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return costs(Module(compiled.as_text())), compiled.cost_analysis()


def turns(count):
    def looped(a):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ a), None), a, None, length=count)[0]

    return looped


def test_a_loops_body_counts_as_often_as_it_runs_where_xla_counts_it_once():
    once, _ = counted(turns(1), A)
    often, compilers = counted(turns(7), A)
    assert once.matrix_flops == 2 * 4**3
    assert often.matrix_flops == 7 * 2 * 4**3 > compilers["flops"]
    assert often.open_loops == 0


def test_loops_multiply():
    def nested(a):
        return jax.lax.scan(lambda x, _: (turns(3)(x), None), a, None, length=5)[0]

    found, _ = counted(nested, A)
    assert found.matrix_flops == 5 * 3 * 2 * 4**3


def test_a_loop_that_depends_on_the_data_is_named():
    def open_loop(a):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: x @ a, a)

    found, _ = counted(open_loop, A)
    assert found.open_loops == 1 and found.matrix_flops == 2 * 4**3


def hlo(*lines, more=""):
    body = "\n".join(f"  {line}" for line in lines)
    return Module(f"HloModule m\n{more}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n")


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [((1, 1), (0, 2)), ((0, 0), (0, 0))])
@pytest.mark.parametrize("spread", [(1, 1), (1, 2)])
def test_products_with_padding_are_not_counted(strides, padding, spread):
    """A product of ones sums ones, as many as there are multiplications."""
    image, kernel = np.ones((2, 7, 6, 3), np.float32), np.ones((3, 2, 3, 5), np.float32)
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        rhs_dilation=spread,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    out = convolve(image, kernel)
    pads = "x".join(f"{low}_{high}" for low, high in padding)
    window = f"size=3x2 stride={strides[0]}x{strides[1]} pad={pads} rhs_dilate=1x{spread[1]}"
    shape = ",".join(map(str, out.shape))
    module = hlo(
        "%x = f32[2,7,6,3] parameter(0)",
        "%k = f32[3,2,3,5] parameter(1)",
        f"ROOT %c = f32[{shape}] convolution(%x, %k), window={{{window}}}, "
        "dim_labels=b01f_01io->b01f",
    )
    x, k, c = module.entry.instructions
    assert convolution_flops(c, x.shape, k.shape) == 2 * float(out.sum())


def test_a_float32_product_takes_as_many_passes_as_it_asks_for():
    product = (
        "ROOT %d = {0}[4,8] dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    )

    def of(dtype, asked):
        arrays = f"%a = {dtype}[4,3] parameter(0)", f"%b = {dtype}[3,8] parameter(1)"
        return costs(hlo(*arrays, product.format(dtype) + asked))

    flops = 2 * 4 * 8 * 3
    highest = ", operand_precision={highest,highest}"
    assert of("f32", highest).matrix_passes == 6 * flops == 6 * of("f32", "").matrix_passes
    assert of("bf16", highest).matrix_passes == of("bf16", "").matrix_flops == flops
    assert of("f32", highest).float32_flops == flops and of("bf16", highest).float32_flops == 0


def test_bytes_include_the_padding_to_tiles_and_leave_out_what_stays_on_the_chip():
    (padded,) = shapes_of("bf16[32,32,3]{2,1,0:T(8,128)(2,1)}")
    assert padded.bytes == 32 * 32 * 128 * 2 == padded.bytes_in_hbm
    (transposed,) = shapes_of("bf16[32,32,3]{0,1,2:T(8,128)(2,1)}")
    assert transposed.bytes == 3 * 32 * 128 * 2
    plain, on_chip = shapes_of("(f32[5,3]{1,0}, f32[5,3]{1,0:T(8,128)S(1)})")
    assert plain.bytes_in_hbm == 60 and on_chip.bytes_in_hbm == 0 < on_chip.bytes


SLICING = """
%taken (a: f32[16,100], i: s32[]) -> f32[1,100] {
  %a = f32[16,100] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[1,100] dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,100}
}

%put (a: f32[16,100], u: f32[1,100], i: s32[]) -> f32[16,100] {
  %a = f32[16,100] parameter(0)
  %u = f32[1,100] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %s = f32[16,100] dynamic-update-slice(%a, %u, %i, %z)
}
"""


def test_of_a_stack_only_the_slice_is_read_or_written():
    stack, index = "%x = f32[16,100] parameter(0)", "%j = s32[] parameter(1)"
    taken = "ROOT %f = f32[1,100] fusion(%x, %j), kind=kLoop, calls=%taken"
    assert costs(hlo(stack, index, taken, more=SLICING)).hbm_bytes == 400 + 4 + 400
    update = "%v = f32[1,100] parameter(2)"
    put = "ROOT %f = f32[16,100] fusion(%x, %v, %j), kind=kLoop, calls=%put"
    assert costs(hlo(stack, index, update, put, more=SLICING)).hbm_bytes == 400 + 4 + 400


def test_collectives_are_counted_by_kind():
    module = hlo(
        "%x = f32[100] parameter(0)",
        "%s = f32[100] all-reduce-start(%x), to_apply=%add",
        "%r = f32[100] all-reduce-done(%s)",
        "%p = (f32[100], f32[400]) all-gather-start(%r), dimensions={0}",
        "ROOT %g = f32[400] all-gather-done(%p)",
        more="%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n"
        "  %b = f32[] parameter(1)\n  ROOT %c = f32[] add(%a, %b)\n}\n",
    )
    found = costs(module)
    assert found.collectives == {"all-gather": 1600, "all-reduce": 400}
    assert found.collective_calls == {"all-gather": 1, "all-reduce": 1}


def test_what_a_loops_condition_asks_of_others_counts_once_more_than_its_body():
    module = hlo(
        "%x = (f32[8]) parameter(0)",
        "ROOT %w = (f32[8]) while(%x), condition=%again, body=%turn",
        more="%turn (a: (f32[8])) -> (f32[8]) {\n  ROOT %a = (f32[8]) parameter(0)\n}\n"
        "%again (c: (f32[8])) -> pred[] {\n  %c = (f32[8]) parameter(0)\n"
        "  %d = f32[8] get-tuple-element(%c), index=0\n"
        "  ROOT %r = pred[] all-reduce(%d), to_apply=%any\n}\n",
    )
    found = costs(module)
    assert found.collective_calls == {"all-reduce": 2} and found.open_loops == 1


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("nothing")


def test_the_bound_is_the_longest_of_three_times():
    chip = CHIPS["v5e"]
    work = {"float32_flops": 0, "elementwise_flops": 0, "host_transfers": 0, "open_loops": 0}
    found = Costs(
        matrix_flops=0,
        matrix_passes=chip.matrix_flops,
        hbm_bytes=chip.hbm_bytes / 2,
        collectives={"all-reduce": chip.link_bytes},
        collective_calls={"all-reduce": 1},
        **work,
    )
    paper = roofline(chip, found, 4)
    assert paper["bound_by"] == "links" and paper["bound_seconds"] == pytest.approx(1.5)
    assert paper["matrix_seconds"] == 1.0 and paper["memory_seconds"] == 0.5
    assert roofline(chip, found, 1)["bound_by"] == "matrix"


@pytest.mark.parametrize(("space", "written"), [("", 400), (":S(1)", 0)])
def test_a_slice_that_is_started_and_awaited_moves_itself_alone(space, written):
    """The type of a start is that of the operand, of the result, and of the transfer."""
    stack, result = "f32[16,100]{1,0}", f"f32[1,100]{{1,0{space}}}"
    found = costs(
        hlo(
            f"%x = {stack} parameter(0)",
            f"%s = (({stack}), {result}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:1], [0:100]}}",
            f"ROOT %d = {result} slice-done(%s)",
        )
    )
    assert found.hbm_bytes == 400 + written
