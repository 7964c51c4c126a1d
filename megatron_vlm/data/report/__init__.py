"""Inspection of data: samples as the model sees them, suspicious samples, and the plots and HTML of the data report.

Modules here only read. Training must not import from here, and command-line parsing belongs to `megatron_vlm.commands`.
"""
