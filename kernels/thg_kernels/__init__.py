"""Kernels of thg_engine, one sub-package per operation; none knows of thg_engine.

Each operation stands beside a plain reference that says what it must compute. Importing this
package imports no kernel and no Triton: take the operation from its own sub-package.
"""
