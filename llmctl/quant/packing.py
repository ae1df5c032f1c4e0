"""Pack codes into 32-bit words without gaps: code i of a row starts at bit i * bits, lowest bits first.

This is the layout of compressed-tensors' `pack-quantized`. Shapes: codes (R, N) uint8; words (R, ceil(N * bits / 32)) int32.
"""

import torch
from torch import Tensor

BLOCK = 32
"""The number of codes that fill whole words at any width."""


def n_words(n_codes: int, bits: int) -> int:
    """Return the number of words of a row."""
    return -(-n_codes * bits // 32)


def pack(codes_RN: Tensor, bits: int) -> Tensor:
    """Pack codes into words; every code must be below 2 ** bits."""
    n_rows, n_codes = codes_RN.shape
    if bits == 8 and n_codes % 4 == 0:  # whole bytes: the words are a reinterpretation
        return codes_RN.contiguous().view(torch.int32).clone()
    padded = torch.nn.functional.pad(codes_RN.to(torch.int64), (0, -n_codes % BLOCK))
    blocks_RGB = padded.view(n_rows, -1, BLOCK)
    words_RGW = blocks_RGB.new_zeros(n_rows, blocks_RGB.shape[1], bits)  # 32 codes of `bits` bits are `bits` words
    for index in range(BLOCK):
        word, shift = divmod(index * bits, 32)
        code_RG = blocks_RGB[:, :, index]
        words_RGW[:, :, word] |= (code_RG << shift) & 0xFFFFFFFF
        if shift + bits > 32:  # the code continues in the next word
            words_RGW[:, :, word + 1] |= code_RG >> (32 - shift)
    words_RW = words_RGW.view(n_rows, -1)[:, : n_words(n_codes, bits)]
    return words_RW.to(torch.int32)  # wraps: values from 2^31 on become negative


def unpack(words_RW: Tensor, bits: int, n_codes: int) -> Tensor:
    """Unpack `n_codes` codes per row from words."""
    n_rows = len(words_RW)
    if bits in (2, 4, 8):  # codes do not cross bytes: a faster path
        # Flat, then in rows: a transposed column counts as contiguous whatever its last stride, which `view` refuses.
        bytes_RB = words_RW.contiguous().flatten().view(torch.uint8).view(n_rows, -1)
        if bits == 8:
            return bytes_RB[:, :n_codes].contiguous()
        parts = [(bytes_RB >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).view(n_rows, -1)[:, :n_codes].contiguous()
    padded = torch.nn.functional.pad(words_RW.to(torch.int64) & 0xFFFFFFFF, (0, -words_RW.shape[1] % bits))
    words_RGW = padded.view(n_rows, -1, bits)
    codes_RGB = torch.empty(n_rows, words_RGW.shape[1], BLOCK, dtype=torch.uint8, device=words_RW.device)
    for index in range(BLOCK):
        word, shift = divmod(index * bits, 32)
        code_RG = words_RGW[:, :, word] >> shift
        if shift + bits > 32:
            code_RG = code_RG | (words_RGW[:, :, word + 1] << (32 - shift))
        codes_RGB[:, :, index] = code_RG & (2**bits - 1)
    return codes_RGB.view(n_rows, -1)[:, :n_codes].contiguous()
