package conf

import (
	"fmt"
	"strconv"
	"strings"
)

// Bytes is a size of memory, read from text such as 512MiB, 4GiB, 4G or 1048576. Units are powers of 1024.
type Bytes int64

var units = []struct {
	name  string
	shift uint
}{{"T", 40}, {"G", 30}, {"M", 20}, {"K", 10}}

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(text []byte) error {
	s := strings.ToUpper(strings.TrimSpace(string(text)))
	s = strings.TrimSuffix(strings.TrimSuffix(s, "B"), "I")
	shift := uint(0)
	for _, u := range units {
		if rest, ok := strings.CutSuffix(s, u.name); ok {
			s, shift = rest, u.shift
			break
		}
	}
	n, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err != nil || !(n >= 0) || n*float64(int64(1)<<shift) > 1<<60 {
		return fmt.Errorf("%q is no size: write 512MiB or 4GiB", text)
	}
	*b = Bytes(n * float64(int64(1)<<shift))
	return nil
}

// String writes the size in its largest unit, to one decimal.
func (b Bytes) String() string {
	for _, u := range units {
		if unit := int64(1) << u.shift; int64(b) >= unit {
			return strings.TrimSuffix(strconv.FormatFloat(float64(b)/float64(unit), 'f', 1, 64), ".0") + " " + u.name + "iB"
		}
	}
	return strconv.FormatInt(int64(b), 10) + " B"
}
