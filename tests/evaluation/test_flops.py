"""What a call is counted to take, against the products it is made of."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vtc.evaluation.flops import flops_of

pytestmark = pytest.mark.eval


def test_two_operations_for_each_multiplication_of_a_matrix_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops_of(lambda: a @ b) == 2 * 3 * 5 * 7


def test_attention_on_this_device_is_counted_as_its_two_products():
    q, k = torch.rand(1, 2, 9, 16), torch.rand(1, 2, 31, 16)
    count = flops_of(lambda: scaled_dot_product_attention(q, k, k))
    assert count == 2 * 2 * (2 * 9 * 31 * 16)


def test_element_wise_work_and_sorting_count_as_none():
    x = torch.rand(63)
    assert flops_of(lambda: (x * x + 1).sort()) == 0
