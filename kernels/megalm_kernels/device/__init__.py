"""The Triton kernels and what launches them; imported when one is first launched, never before.

A file here has the name of the file above that calls it. No kernel does arithmetic on bf16 (the interpreter would add the
bits), every address is computed in int64, and block sizes come from `tables.py`.
"""

from megalm_kernels import compat

if compat.interpreting():
    compat.mend_interpreter()
