# shellcheck shell=bash disable=SC2034,SC2154  # train.sbatch's variables
# For train.sbatch: which words start a command in a container. Sourced; uses and sets its variables.
#
# Inside are the folder of submission and the project, under their own paths, and what RLHF_BIND names ("/data,/scratch").

open_container() {   # $container -> inside=(apptainer exec ...), or step=(srun's flags for pyxis)
  local runtime=${RLHF_CONTAINER_RUNTIME:-} tool=''
  local name
  for name in apptainer singularity; do
    [ -n "$tool" ] || ! command -v "$name" > /dev/null || tool=$name
  done
  if [ -z "$runtime" ]; then
    if [ -n "$tool" ]; then runtime=apptainer
    elif srun --help 2>&1 | grep -q -- --container-image; then runtime=pyxis
    else die "--container needs Apptainer on the nodes or the pyxis plugin in Slurm, and $(hostname) has neither"; fi
  fi
  case $runtime in
    apptainer) use_apptainer "${tool:-apptainer}" ;;
    pyxis) use_pyxis ;;
    *) die "RLHF_CONTAINER_RUNTIME is apptainer or pyxis, not '$runtime'" ;;
  esac
}

use_apptainer() {
  local tool=$1 image=$container gpu=() binds=() folder
  case $image in
    docker://*) fetch_image "$tool" ;;
    *) [ -e "$image" ] || die "no image at $image; make one with: $tool build NAME.sif docker://..." ;;
  esac
  [ "$(gpus_here)" -eq 0 ] || gpu=(--nv)
  for folder in "$PWD" "$root" ${RLHF_BIND:+${RLHF_BIND//,/ }}; do binds+=(--bind "$folder"); done
  inside=("$tool" exec "${gpu[@]}" "${binds[@]}" --pwd "$PWD" "$image")
}

fetch_image() {   # once, not on every node; compute nodes are often without internet, so a .sif is the better thing to have
  local folder=${RLHF_IMAGES:-$PWD/images} file
  file=$folder/$(tr -c 'A-Za-z0-9.\n' '_' <<< "${image#docker://}").sif
  if [ ! -e "$file" ]; then
    mkdir -p "$folder"
    say "fetching $image (once; on a login node: $1 pull $file $image)"
    "$1" pull "$file.$SLURM_JOB_ID" "$image" || die "$1 could not fetch $image on $(hostname); fetch it where there is internet, and give --container $file"
    mv "$file.$SLURM_JOB_ID" "$file"
  fi
  image=$file
}

use_pyxis() {
  local image=$container mounts folder
  case $image in
    *.sif) die "pyxis can't run $image (a .sif file); give docker://... or a .sqsh file" ;;
    docker://*) image=${image#docker://} ;;   # enroot's own name for a registry's image has no docker://
  esac
  mounts=$PWD:$PWD,$root:$root
  for folder in ${RLHF_BIND:+${RLHF_BIND//,/ }}; do mounts+=,$folder:$folder; done
  step=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
}
