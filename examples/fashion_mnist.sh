#!/usr/bin/env bash
# x against v on Fashion-MNIST, three seeds: bash examples/fashion_mnist.sh FOLDER OUT
# FOLDER holds the four IDX files, as Debian's package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist.
# Needs pip install 'jlt[quickstart]'. Six trainings of the quickstart's size.
set -euo pipefail
folder=$1 out=$2
jlt encode "idx:$folder" "$out/latents" --stride 8 --num-held-out 2500
jlt geometry "$out/latents" --rank 16 --out "$out/geometry"
jlt compare digits "$out/latents" "$out/compared" --vary target=x,v seed=0,1,2 --sampling.num-images 2500 --sampling.scale 2
jlt report "$out/compared"
