"""Reading a scheduled program: which products an exchange is independent of, and which run while it is under way."""

from dsv3_jax.parallel.program import ExchangeOverlap, exchange_overlaps

HLO = """HloModule step, is_scheduled=true

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%exchange (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %ragged-all-to-all.1 = f32[8,8]{1,0} ragged-all-to-all(%q), replica_groups={{0,1}}
}

%body (x: (f32[8,8], f32[8,8])) -> (f32[8,8], f32[8,8]) {
  %x = (f32[8,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %a = f32[8,8]{1,0} get-tuple-element(%x), index=0
  %b = f32[8,8]{1,0} get-tuple-element(%x), index=1
  %before = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%fused
  %start = ((f32[8,8]{1,0}), f32[8,8]{1,0}) async-start(%before), calls=%exchange
  %beside = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%b, %b), custom_call_target="__cublas$gemm"
  %done = f32[8,8]{1,0} async-done(%start)
  %after = f32[8,8]{1,0} fusion(%done), kind=kOutput, calls=%fused
  %late = f32[8,8]{1,0} fusion(%b), kind=kOutput, calls=%fused
  %blocking = f32[8,8]{1,0} all-to-all(%late), replica_groups={{0,1}}
  ROOT %out = (f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%after, %blocking)
}
"""


def test_products_beside_an_exchange_are_counted():
    assert exchange_overlaps(HLO) == [
        ExchangeOverlap("body", "start", products=4, independent=2, during=1),
        ExchangeOverlap("body", "blocking", products=4, independent=3, during=None),
    ]
