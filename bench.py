"""Benchmarks of the integer model, of a training step and of tensor trains: time, size, memory.

    python bench.py matmul      # one Linear layer of XLM-R base in float32, bf16 and int8
    python bench.py model       # the whole model: latency, file size, memory
    python bench.py rows        # pairs of sentences end to end: tokenize, batch, run
    python bench.py train       # a training step on XLM-R base's shape: FP32, QAT, SDQ
    python bench.py tt          # tensor trains: one layer, the model for ATIS, a training step
    python bench.py train --layers 4 --hidden 384 --vocab 8000

A shared machine drifts by tens of percent within minutes, so measurements of one variant after the
other would compare two moments, not two programs. Here every round runs each variant once; times are
medians over the rounds, and a ratio is the median of the ratios within each round.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from checkpoint import check_config, config_of, initial_model, read_checkpoint, weight_of
from common import Progress, UserError, exit_status, flag, hardware, markdown_table, write_json
from config import OneLineParser, TrainConfig, resolve
from data.batches import IGNORE, Batch, Dataset, collate, dataset_of, evaluation_batches
from data.tasks import find_data, find_task, load
from data.tokenizer import Tokenizer
from int8 import IntLinear, choose_kernel
from model import PRESETS, Model, ModelConfig, build_model, initialize, set_dropout
from prepare import prepare
from quant import ActQuantizer, QuantConfig, UniformQuantizer, choose_qparams
from tools import backends
from tt import TTConfig, TTLinear, count_flops
