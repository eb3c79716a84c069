package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
)

var (
	exampleComment = regexp.MustCompile(`   +[^ ].*$`)         // what an example does, beside it
	exampleWord    = regexp.MustCompile(`'[^']*'|"[^"]*"|\S+`) // of a shell's command line
)

// Every command that people call has examples, and all of them are command lines of that command that the parser takes.
func TestExamplesOfHelp(t *testing.T) {
	var c cli
	all := newParser(&c, nil, new(bytes.Buffer), new(bytes.Buffer), func(int) {})
	n := 0
	for _, node := range all.Model.Leaves(true) {
		path := strings.TrimSpace(strings.SplitN(node.FullPath(), " <", 2)[0])
		if node.Hidden || path == "trireme version" {
			continue
		}
		_, examples, there := strings.Cut(node.Detail, "Examples:")
		if !there {
			t.Errorf("%s --help has no examples", path)
			continue
		}
		mine := 0
		for line := range strings.Lines(examples) {
			if !strings.HasPrefix(line, "  ") || strings.HasPrefix(line, "     ") { // of an example's comment
				continue
			}
			for part := range strings.SplitSeq(exampleComment.ReplaceAllString(strings.TrimSpace(line), ""), " | ") {
				var words []string
				for _, w := range exampleWord.FindAllString(part, -1) {
					words = append(words, strings.Trim(w, `'"`))
				}
				if words[0] != "trireme" {
					continue
				}
				if strings.HasPrefix(strings.Join(words, " ")+" ", path+" ") {
					mine++
				}
				var c cli
				args, _, _ := strings.Cut(strings.Join(words[1:], "\x00"), "\x00>\x00")
				words = strings.Split(args, "\x00")
				parser := newParser(&c, words, new(bytes.Buffer), new(bytes.Buffer), func(int) {})
				if _, err := parser.Parse(shielded(words)); err != nil {
					t.Errorf("%s --help: %s: %v", path, strings.TrimSpace(line), err)
				}
			}
		}
		if mine == 0 {
			t.Errorf("%s --help: no example is one of it:%s", path, examples)
		}
		n++
	}
	if n < 25 {
		t.Errorf("%d commands were looked at", n)
	}
}
