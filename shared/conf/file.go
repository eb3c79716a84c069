package conf

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"gopkg.in/yaml.v3"
)

// ErrFile is wrapped by errors of a configuration file.
var ErrFile = errors.New("invalid configuration file")

// YAML is a kong.ConfigurationLoader. Keys are flag names; those of a command stand under the command's name:
//
//	log-level: debug
//	up:
//	  http: 0.0.0.0:8080
//	  topology: 2E1P1D
//
// Flags given on the command line and environment variables stand above the file. A key that is no flag is an error that
// names it, and the file.
func YAML(r io.Reader) (kong.Resolver, error) {
	file := ""
	if f, ok := r.(interface{ Name() string }); ok { // kong gives an *os.File
		file = " " + f.Name()
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("%w%s: %w", ErrFile, file, err)
	}
	values, err := settings(data)
	if err != nil {
		return nil, fmt.Errorf("%w%s: %w", ErrFile, file, err)
	}
	return &resolver{file, values}, nil
}

// settings is what a file says: strings as they are written, nil where there is no value, and lists and maps of these.
func settings(data []byte) (map[string]any, error) {
	var file yaml.Node
	if err := yaml.Unmarshal(data, &file); err != nil {
		return nil, err
	}
	verbatim(&file)
	values := map[string]any{}
	return values, file.Decode(&values)
}

// verbatim has all values be strings: to YAML a name or a key 0123 is the number 83.
func verbatim(n *yaml.Node) {
	switch n.ShortTag() {
	case "!!int", "!!float", "!!bool", "!!timestamp":
		n.Tag = "!!str"
	}
	for _, below := range n.Content {
		verbatim(below)
	}
}

// Setting is what a file of settings says at a path of commands and a flag, "" when it says nothing or there is no file: for who starts
// others that read it themselves.
func Setting(file string, path ...string) (string, error) {
	if file == "" {
		return "", nil
	}
	data, err := os.ReadFile(kong.ExpandPath(file))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrFile, err)
	}
	values, err := settings(data)
	if err != nil {
		return "", fmt.Errorf("%w %s: %w", ErrFile, file, err)
	}
	var at any = values
	for _, key := range path {
		under, _ := at.(map[string]any)
		at = under[key]
	}
	if at == nil {
		return "", nil
	}
	return fmt.Sprint(at), nil
}

type resolver struct {
	file   string // its name with a blank in front, or empty
	values map[string]any
}

// Validate implements kong.Resolver: every key must be a flag.
func (r *resolver) Validate(app *kong.Application) error {
	if err := check(app.Node, "", r.values); err != nil {
		return fmt.Errorf("%w%s: %w", ErrFile, r.file, err)
	}
	return nil
}

func check(n *kong.Node, path string, values map[string]any) error {
	for key, v := range values {
		at := strings.TrimPrefix(path+"."+key, ".")
		if child := childOf(n, key); child != nil {
			if v == nil { // all of it is a comment
				continue
			}
			under, ok := v.(map[string]any)
			if !ok {
				return fmt.Errorf("%s is a command, its flags stand under it", at)
			}
			if err := check(child, at, under); err != nil {
				return err
			}
			continue
		}
		if !hasFlag(n, key) {
			if owners := commandsWith(n, key); len(owners) > 0 {
				return fmt.Errorf("there is no setting %s here: it belongs under the name of its command, %s", at, strings.Join(owners, " or "))
			}
			return fmt.Errorf("there is no setting %s", at)
		}
		if list, ok := v.([]any); v == nil || ok && slices.Contains(list, nil) {
			return fmt.Errorf("%s has no value: write one, or leave it out", at)
		}
	}
	return nil
}

func childOf(n *kong.Node, name string) *kong.Node {
	for _, c := range n.Children {
		if c.Type == kong.CommandNode && c.Name == name {
			return c
		}
	}
	return nil
}

// commandsWith returns the commands right under n that have a flag.
func commandsWith(n *kong.Node, flag string) []string {
	var names []string
	for _, c := range n.Children {
		if hasFlag(c, flag) {
			names = append(names, c.Name)
		}
	}
	return names
}

func hasFlag(n *kong.Node, name string) bool {
	for _, f := range n.Flags {
		if f.Name == name && name != "config" && name != "help" {
			return true
		}
	}
	return false
}

// Resolve implements kong.Resolver.
func (r *resolver) Resolve(_ *kong.Context, parent *kong.Path, flag *kong.Flag) (any, error) {
	for _, name := range flag.Envs { // kong would let the file win
		if _, set := os.LookupEnv(name); set {
			return nil, nil
		}
	}
	values := r.values
	if n := parent.Node(); n != nil && n.Type == kong.CommandNode {
		var path []string
		for ; n != nil && n.Type == kong.CommandNode; n = n.Parent {
			path = append([]string{n.Name}, path...)
		}
		for _, name := range path {
			under, ok := values[name].(map[string]any)
			if !ok {
				return nil, nil
			}
			values = under
		}
	}
	v, ok := values[flag.Name]
	if !ok {
		return nil, nil
	}
	if list, ok := v.([]any); ok {
		items := make([]string, len(list))
		for i, item := range list {
			items[i] = fmt.Sprint(item)
		}
		return strings.Join(items, ","), nil
	}
	return fmt.Sprint(v), nil
}
