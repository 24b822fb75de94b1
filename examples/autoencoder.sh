#!/usr/bin/env bash
# The same pictures in two latent spaces, and what each loses: bash examples/autoencoder.sh PHOTOS OUT
# Any image autoencoder of diffusers will do: an id on the Hub, or a folder with config.json and its safetensors file.
# Needs pip install 'jlt[quickstart,autoencoders]'. A kind of network that diffusers has and jlt has not yet is a row of
# CLASSES in src/jlt/data/autoencoders.py.
set -euo pipefail
photos=$1 out=$2
jlt encode "$photos" "$out/sd" --representation autoencoder:stabilityai/sd-vae-ft-mse --image-size 256 --num-held-out 200
jlt encode "$photos" "$out/pca" --representation patch-pca --stride 8 --channels 4 --image-size 256 --num-held-out 200
jlt latents show "$out/sd" --out "$out/sd.png"
jlt latents show "$out/pca" --out "$out/pca.png"
jlt geometry "$out/sd"
jlt compare small "$out/sd" "$out/compared" --vary "latents=$out/sd,$out/pca" --base.patch-size 2
jlt report "$out/compared"
