#!/usr/bin/env bash
# Fetch COCO 2017 (pictures, captions, boxes) into a folder in its standard layout.
# Run it again after an interruption: it goes on where it stopped and never overwrites a file.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/download_coco.sh DIR [--val-only]

  DIR         folder to fill: DIR/train2017 DIR/val2017 DIR/annotations (archives in DIR/archives)
  --val-only  leave out the training pictures (19.3 GB to fetch, as much again unpacked)

COCO_URL names another server with the same paths (default http://images.cocodataset.org).
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

directory="" val_only=false
for argument in "$@"; do
    case "$argument" in
        -h | --help) usage; exit 0 ;;
        --val-only) val_only=true ;;
        -*) fail "unknown option $argument (known: --val-only, --help)" ;;
        *) [[ -z "$directory" ]] || fail "one folder only, not $directory and $argument"
           directory="$argument" ;;
    esac
done
[[ -n "$directory" ]] || fail "name a folder: bash scripts/download_coco.sh data/coco"
for tool in curl unzip md5sum; do
    command -v "$tool" > /dev/null || fail "$tool is needed and not installed"
done

url="${COCO_URL:-http://images.cocodataset.org}"
# path on the server, bytes, md5, the folder it unpacks to
archives=(
    "annotations/annotations_trainval2017.zip 252907541 f4bbac642086de4f52a3fdda2de5fa2c annotations"
    "zips/val2017.zip 815585330 442b8da7639aecaf257c1dceb8ba8c80 val2017"
)
if ! $val_only; then
    archives+=("zips/train2017.zip 19336861798 cced6f7f71b7629ddf16f17bbcfab6b2 train2017")
fi

mkdir -p "$directory/archives"

fetch() { # path bytes md5
    local path="$1" bytes="$2" md5="$3" file have=0
    file="$directory/archives/$(basename "$path")"
    if [[ -f "$file" ]]; then have=$(wc -c < "$file"); fi
    echo "$path: $((bytes / 1000000)) MB, $(((bytes - have) / 1000000)) MB to fetch"
    if ((have < bytes)); then
        curl --fail --location --retry 3 --continue-at - --output "$file" "$url/$path" ||
            fail "could not fetch $url/$path; check the network and run this again, it goes on from there"
        have=$(wc -c < "$file")
    fi
    ((have == bytes)) || fail "$file has $have bytes, not $bytes; remove it and run this again"
    echo "$md5  $file" | md5sum --check --status ||
        fail "$file has another md5 than the published one; remove it and run this again"
}

for entry in "${archives[@]}"; do
    read -r path bytes md5 folder <<< "$entry"
    if [[ -e "$directory/$folder" ]]; then
        echo "$directory/$folder is there already: left alone"
        continue
    fi
    fetch "$path" "$bytes" "$md5"
    echo "$path: unpacking"
    partial="$directory/archives/$folder.partial"  # a whole folder appears at once, or none
    rm -rf "$partial"
    unzip -q "$directory/archives/$(basename "$path")" -d "$partial" ||
        fail "could not unpack $path; is the disk full?"
    mv -n "$partial/$folder" "$directory/$folder"
    rm -rf "$partial"
done

echo "done: $directory ($(du -sh "$directory" | cut -f1)); the archives in $directory/archives may go"
echo "next: python -m superclip.pack coco --root $directory --out data/shards"
