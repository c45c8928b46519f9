#!/bin/sh
# Point a Debian's or Ubuntu's own package sources at a mirror, whatever host they name, in either format (sources.list,
# *.list and *.sources). Sources of others (NVIDIA's, say) stay as they are, and are told.
#
#   apt-mirror.sh http://mirror.example [/etc/apt]    the mirror has /debian, /debian-security or /ubuntu below it
set -eu

mirror=${1%/} folder=${2:-/etc/apt}
case $mirror in
  http://* | https://*) ;;
  *) echo "apt-mirror.sh: APT_MIRROR is '$1'; expected an address such as http://mirror.example" >&2; exit 2 ;;
esac
address=$(printf %s "$mirror" | sed 's/[&#\\]/\\&/g')   # as sed wants it in a replacement
files=$(find "$folder" -type f \( -name '*.list' -o -name '*.sources' \))
[ -n "$files" ] || { echo "apt-mirror.sh: no *.list or *.sources in $folder" >&2; exit 2; }

printf '%s\n' "$files" | while IFS= read -r file; do
  sed -Ei "s#https?://[^[:space:]]*/(debian|debian-security|ubuntu|ubuntu-ports)(/?)([[:space:]]|\$)#$address/\1\2\3#g" "$file"
done
left=$(printf '%s\n' "$files" | while IFS= read -r file; do
  grep -Ev '^[[:space:]]*#' "$file" | grep -Eo '[a-z+]+:/[^[:space:]]+' || true
done | grep -Fv "$mirror/" | sort -u | paste -sd ' ' -)
[ -z "$left" ] || echo "apt-mirror.sh: not on the mirror: $left"
