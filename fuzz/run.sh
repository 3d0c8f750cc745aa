#!/bin/sh
# Usage: fuzz/run.sh SECONDS [TARGET...]
# Builds the fuzz targets with stable Rust and runs each for SECONDS, from the committed corpus and the one that grows in
# fuzz/target. A failing input stays in fuzz/artifacts.
set -eu
seconds=$1
shift
cd "$(dirname "$0")"
targets=${*:-$(sed -n 's/^name = "\(.*_or_.*\)"/\1/p' Cargo.toml)}
host=$(rustc -vV | sed -n 's/^host: //p')

# An explicit --target keeps the flags from build scripts.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks" \
    CARGO_TARGET_DIR=target cargo build --release --target "$host" --bins

for target in $targets; do
    mkdir -p "target/corpus/$target" "artifacts/$target" "corpus/$target"
    log=target/$target.log
    echo "$target: $seconds seconds"
    if ! "target/$host/release/$target" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=1024 \
        -malloc_limit_mb=256 -print_final_stats=1 -artifact_prefix="artifacts/$target/" \
        "target/corpus/$target" "corpus/$target" >"$log" 2>&1; then
        tail -n 50 "$log"
        exit 1
    fi
    grep -E '^(stat|Done)' "$log"
    echo "corpus: $(ls "target/corpus/$target" "corpus/$target" | wc -l) files"
done
