#!/usr/bin/env bash
# Publishes a checkpoint with nothing but bash: writes a safetensors file, announces it in NATS's
# text protocol, waits until the engines have it, and prints what they say.
#
#   usage: WEIGHTBUS_NATS_URL=nats://HOST:PORT publish.sh MODEL VERSION /ABSOLUTE/FILE [SECONDS]
#
# The engines' consumers read below their `--root` only. TLS and credentials need a client library:
# see publish.mjs and publish.c. The wire contract is docs/publish-from-any-language.md.
set -euo pipefail
export LC_ALL=C # lengths are in bytes
die() { echo "publish.sh: $*" >&2; exit 1; }

[ $# -ge 3 ] || die "usage: publish.sh MODEL VERSION /ABSOLUTE/FILE [SECONDS]"
model=$1 version=$2 file=$3 wait_s=${4:-60}
[[ $version =~ ^-?[0-9]{1,18}$ ]] || die "$version: is no version"
server=${WEIGHTBUS_NATS_URL:?what weightbus serve printed} && server=${server#nats://}
at=weightbus.$model # the default prefix, and the model

# A safetensors file: 8 bytes length of the header, the header, the tensors back to back.
le64() { # NUMBER, as 8 bytes, the lowest first
    local n=$1 i bytes=
    for i in {0..7}; do printf -v bytes '%s\\x%02x' "$bytes" $((n & 255)); n=$((n >> 8)); done
    printf %b "$bytes"
}
layer=model.layers.0 header= data= end=0
for name in model.embed_tokens $layer.input_layernorm $layer.self_attn.{q,k,v,o}_proj \
    $layer.post_attention_layernorm $layer.mlp.{gate,up,down}_proj model.norm lm_head; do
    case $name in *norm) shape=2 count=2 ;; *) shape=2,2 count=4 ;; esac
    begin=$end end=$((end + 4 * count))
    header+="${header:+,}\"$name.weight\":{\"dtype\":\"F32\",\"shape\":[$shape],"
    header+="\"data_offsets\":[$begin,$end]}"
    for ((at_byte = begin; at_byte < end; at_byte += 4)); do # 1 + n / 128, as an F32
        printf -v data '%s\\x00\\x00\\x%02x\\x3f' "$data" $((128 | (version + at_byte / 4) & 127))
    done
done
header="{$header}"
{ le64 ${#header}; printf %s "$header"; printf %b "$data"; } >"$file"

base64_begin() { # TEXT: base64 of its first kilobyte, whole groups of 3 bytes only
    local digits=({A..Z} {a..z} {0..9} + /) i j byte group shift
    for ((i = 0; i + 3 <= ${#1} && i < 1023; i += 3)); do
        for ((group = 0, j = i; j < i + 3; j++)); do
            printf -v byte %d "'${1:j:1}"
            group=$((group << 8 | byte & 255))
        done
        for shift in 18 12 6 0; do printf %s "${digits[group >> shift & 63]}"; done
    done
}

exec 3<>"/dev/tcp/${server%:*}/${server##*:}" || die "there is no bus at $server"
IFS= read -r -t 5 -u 3 info && [[ $info == INFO* ]] || die "this is no NATS server: $server"
quoted=${file//\\/\\\\} quoted=${quoted//\"/\\\"}
body="{\"type\":\"CheckpointReady\",\"schema_version\":1,\"model\":\"$model\",\"version\":$version"
body+=",\"created_ns\":${EPOCHREALTIME/./}000,\"producer\":\"shell\",\"files\":[\"$quoted\"]}"
sent=$(base64_begin "$body")
head=$'NATS/1.0\r\nContent-Type: application/json\r\nNats-Msg-Id: '$model/$version/shell$'\r\n\r\n'
inbox=_INBOX.publish-sh.$$.$RANDOM$RANDOM
printf '%s\r\n' 'CONNECT {"verbose":false,"headers":true,"no_responders":true,"lang":"bash"}' \
    "SUB $inbox 1" "SUB $at.round.*.done 2" "SUB $at.update.* 3" "SUB $at.dead 4" \
    "HPUB $at.checkpoint.ready $inbox ${#head} $((${#head} + ${#body}))" "$head$body" >&3

failed="nobody has answered: is a consumer following $model?" deadline=$((SECONDS + wait_s))
while ((SECONDS < deadline)) && IFS= read -r -t $((deadline - SECONDS)) -u 3 line; do
    read -ra said <<<"${line%$'\r'}"
    case ${said[0]} in
    PING) printf 'PONG\r\n' >&3 ;;
    -ERR) die "the server refuses: $line" ;;
    MSG | HMSG) # subject, subscription, [reply], [size of the headers], size of all
        size=${said[-1]} skip=0
        [ "${said[0]}" = MSG ] || skip=${said[-2]}
        IFS= read -r -t 5 -N $((size + 2)) -u 3 all || die "the connection was lost"
        text=${all:skip:size-skip}
        case ${said[2]} in
        1) [[ $text == *'"seq"'* && ! $text =~ '"duplicate":'\ ?true ]] ||
            die "not stored: ${text:-no JetStream}" ;;
        2) [[ $text == *"\"version\":$version,"* ]] || continue
            echo "$text"
            [[ $text == *'"failed":{}'* ]]
            exit ;;
        3) [[ $text == *'"UpdateFailed"'*"\"version\":$version,"* ]] || continue
            failed=$text
            [[ $text != *'"cause":"VersionNotNew"'* ]] || die "not new: $text" ;;
        4) [[ $text != *"\"payload\":\"$sent"* ]] || die "dead letter: $text" ;;
        esac ;;
    esac
done
die "no round of version $version was over within $wait_s s: $failed"
